"""From stored chunks to arrays on the devices of any mesh."""

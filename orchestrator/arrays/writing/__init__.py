"""From the devices to durable files of an Orbax checkpoint."""

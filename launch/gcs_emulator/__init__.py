"""A Google Cloud Storage emulator for tests and demos: real generations and preconditions, and faults on command."""

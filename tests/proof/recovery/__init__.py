"""Hosts are lost, with and without their memory: what the job comes back to, and how fast. `make recovery`."""

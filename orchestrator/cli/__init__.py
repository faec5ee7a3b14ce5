"""The `orchestrator` command. Reads journals and records; never needs JAX."""

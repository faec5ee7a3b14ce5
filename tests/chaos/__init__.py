"""The fault campaign: real jobs, real faults, the run's invariants checked from outside. `python -m tests.chaos --help`."""

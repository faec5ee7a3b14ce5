"""The fault campaign: real jobs, real faults, invariants checked from outside. `python -m tests.proof.chaos --help`."""

"""The incident rehearsal: real jobs, real trouble, and what each tool says of it. `python -m tests.proof.incidents`."""

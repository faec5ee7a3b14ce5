"""The protocol's model checker: the shipped pure rules under every interleaving of rivals, crashes and lost replies.

`python -m tests.proof.model` prints the scenarios, the mutations and what caught them. docs/reference/proof.md says
what is covered. `invariants` states the on-disk contract's invariants once, for the model, the crash explorer and
campaigns.
"""

"""What is decided, and by which rules. Shells in the other folders read, ask here, and carry out the answer.

Pure: a rule is given all that it goes by, time and random ids included (`journal.Stamp`), and returns a value. So every
rule can be asked again, tested in tables, and run by the model checker under every interleaving.

A module here may import Python's pure modules (`dataclasses`, `math`, `re`, `json`, ...), msgspec, crc32c, `options`,
`policy`, other rules and the leaves of the package (of `environment` only variables' names). It may not import os,
time, threading, random, absl, numpy, jax, TensorStore or Orbax, nor any other folder: tests/test_layout_rules.py.
"""

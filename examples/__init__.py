"""Small training jobs with Flax, Optax and Grain, made to be copied from; tests/pages/test_examples.py runs them all.

Each file is a whole program: the last lines, which join a launcher's job and read the flags, are the same in all on
purpose. Shared, they would be missing from every copy.
"""

"""Small training jobs with Flax, Optax and Grain, made to be copied from.

tests/pages/test_examples.py runs each of them.
"""

"""Small training jobs with Flax, Optax and Grain, made to be copied from. tests/test_examples.py runs each of them."""

"""The example training job and the demo: made to be copied from."""

"""Launchers that start a multihost JAX job, and the example training job. The engine knows nothing of this package."""

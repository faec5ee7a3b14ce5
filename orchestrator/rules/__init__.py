"""Decisions. Pure: what is here imports no os, no clock, no threads, no absl and no JAX arrays."""

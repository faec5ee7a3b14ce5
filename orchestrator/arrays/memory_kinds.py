"""Which memory the arrays of a sharding lie in."""

from __future__ import annotations

import functools
from typing import Any

import jax


@functools.lru_cache(maxsize=256)
def on_host(sharding: jax.sharding.Sharding) -> bool:
    """Whether its devices are CPUs, whose arrays lie where numpy's do."""
    device: Any = next(iter(sharding.device_set))
    return bool(device.platform == "cpu")


@functools.lru_cache(maxsize=256)
def in_default_memory(sharding: jax.sharding.Sharding) -> bool:
    """Whether its arrays are where its devices have theirs by default; else in host memory that belongs to them."""
    device: Any = next(iter(sharding.device_set))
    return sharding.memory_kind in (None, device.default_memory().kind)

"""Taking from the devices what a plan says that this process writes: buffers on the host, and the chunks in them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.planning import LeafPlan, Pieces, as_stored

Array = np.ndarray[Any, Any]
Part = tuple[Array, Pieces]  # a shard's elements, and the chunks to write of it


@functools.lru_cache(maxsize=256)
def on_host(sharding: jax.sharding.Sharding) -> bool:
    device: Any = next(iter(sharding.device_set))
    return bool(device.platform == "cpu")


def start_transfers(leaves: Iterable[tuple[LeafPlan, Any]]) -> None:
    """All copies from accelerators under way before the first is waited for."""
    for plan, value in leaves:
        if plan.sharding is not None and not on_host(plan.sharding) and plan.leaf.kind != "key":
            for index, _ in plan.shards:
                value.addressable_data(index).copy_to_host_async()


def take(plan: LeafPlan, value: Any) -> list[Part]:
    """The parts of one leaf. Copies from accelerators, and out of the host's own arrays, in native byte order: the
    caller may overwrite them as soon as all are taken. CPU arrays are held, not copied.

    `_arrays` is private (jax 0.10.2): what addressable_data looks up, which takes twice as long for small arrays.
    tests/test_private_apis.py watches it.
    """
    if plan.leaf.kind == "key":
        value = as_stored(plan.leaf, value)
    if plan.whole is not None:
        return [(np.array(value, dtype=plan.whole, order="C"), pieces) for _, pieces in plan.shards]
    held = value._arrays
    return [(np.asarray(held[index]), pieces) for index, pieces in plan.shards]


# What the buffer protocol knows; of the others numpy must be asked.
_VIEWED = frozenset(
    ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64")
)


@functools.lru_cache(maxsize=4096)
def _viewed(sharding: jax.sharding.Sharding | None, dtype: str) -> bool:
    return sharding is not None and on_host(sharding) and dtype in _VIEWED


def take_small(plan: LeafPlan, value: Any) -> list[tuple[str, bytes]]:
    """Key and elements of each chunk of a small leaf. A copy: quicker than to hold the buffer."""
    if not _viewed(plan.sharding, plan.leaf.dtype):
        return [(key, data.tobytes()) for data, ((key, _),) in take(plan, value)]
    held = value._arrays
    return [(key, bytes(memoryview(held[index]))) for index, ((key, _),) in plan.shards]

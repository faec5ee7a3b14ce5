"""Taking from the devices what a plan says that this process writes: buffers on the host, and the chunks in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from orchestrator.arrays.planning import LeafPlan, Pieces, Plan, as_stored

Array = np.ndarray[Any, Any]
Part = tuple[Array, Pieces]  # a shard's elements, and the chunks to write of it


def start_transfers(plan: Plan, values: Sequence[Any]) -> None:
    """All copies from accelerators under way before the first is waited for."""
    for number, leaf_plan in plan.off_host:
        for index, _ in leaf_plan.shards:
            values[number].addressable_data(index).copy_to_host_async()


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


def take_small(leaves: Iterable[tuple[LeafPlan, Any]]) -> bytes:
    """The elements of all chunks of small leaves, one after the other. A copy: quicker than to hold the buffers, and
    thousands of them quickest in one go."""
    buffers: list[Any] = []
    for plan, value in leaves:
        if plan.viewed:
            held = value._arrays
            buffers += [held[index] for index, _ in plan.shards]
        else:
            buffers += [data.tobytes() for data, _ in take(plan, value)]
    return b"".join(buffers)

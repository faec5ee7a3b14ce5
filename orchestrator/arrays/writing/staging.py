"""Takes from the devices what this process writes, by its plan: host buffers, and which chunks are in each.

CPU arrays are held, not copied. Accelerators copy theirs to page-locked host memory while training goes on:
an H100 at 50 GiB/s, 25 times as fast as to ordinary memory (docs/benchmarks.md). JAX keeps that memory for the next
save.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from orchestrator.arrays import page_locked
from orchestrator.arrays.jax_internals import shards_of
from orchestrator.arrays.leaf_errors import named
from orchestrator.arrays.writing.write_plan import LeafPlan, Pieces, as_stored

StagedPart = tuple[Any, Pieces]  # a shard's elements, which np.asarray gives on the host, and its chunks to write


def start(leaves: Sequence[tuple[LeafPlan, Any]]) -> list[Any]:
    """Start copying leaves on accelerators (`off_host`) to the host: all at once. Returns copies of their
    `shards_to_write`. JAX runs a program that donates the leaves only after the copies.

    Where page-locked memory has run out (XLA uses 64 GB at most, or XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB), the copies are
    numpy arrays, and this call waits for them.
    """
    return to_host(shards) if (shards := shards_to_write(leaves)) else []


def shards_to_write(leaves: Sequence[tuple[LeafPlan, Any]]) -> list[Any]:
    """Those shards of the leaves that this process writes, in order."""
    return [shards_of(as_stored(plan.leaf, value))[index] for plan, value in leaves for index, _ in plan.shards]


def to_host(shards: list[Any]) -> list[Any]:
    """As `start`: copies of arrays of one device each."""
    try:
        return page_locked.copies(shards)
    except page_locked.NO_ROOM:
        return [_copy(shard) for shard in shards]


def _copy(shard: Any) -> Any:
    try:
        return page_locked.copies([shard])[0]
    except page_locked.NO_ROOM:
        return np.asarray(shard)


def take(plan: LeafPlan, value: Any) -> list[StagedPart]:
    """The parts of one leaf on the host. numpy arrays are copied, in native byte order: the caller may overwrite them
    once this returns. CPU arrays of JAX are held, not copied.
    """
    if plan.whole is not None:
        return [(np.array(value, dtype=plan.whole, order="C"), pieces) for _, pieces in plan.shards]
    held = shards_of(as_stored(plan.leaf, value))
    from_host: Any = np.array if plan.offloaded else np.asarray  # offloaded arrays may be donated: copy them
    return [(from_host(held[index]), pieces) for index, pieces in plan.shards]


def take_small(leaves: Iterable[tuple[LeafPlan, Any]]) -> bytes:
    """The elements of all chunks of small leaves on the host, one after the other. One copy of thousands of leaves is
    quicker than holding their buffers."""
    buffers: list[Any] = []
    for plan, value in leaves:
        try:
            if plan.viewed:
                held = shards_of(value)
                buffers += [memoryview(held[index]) for index, _ in plan.shards]
            else:
                buffers += [data.tobytes() for data, _ in take(plan, value)]
        except Exception as error:
            raise named(plan.leaf, error) from error
    return b"".join(buffers)

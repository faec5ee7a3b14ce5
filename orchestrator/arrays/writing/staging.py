"""Taking from the devices what a plan says that this process writes: buffers on the host, and the chunks in them.

CPU arrays are held, not copied. Accelerators copy theirs to page-locked memory of the host by themselves, while
training goes on: an H100 at 50 GiB/s, where ordinary memory takes 25 times as long (docs/benchmarks.md). JAX keeps such
memory for the next save.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.jax_internals import shards_of
from orchestrator.arrays.leaf_errors import named
from orchestrator.arrays.memory_kinds import PINNED_HOST
from orchestrator.arrays.writing.write_plan import LeafPlan, Pieces, as_stored

StagedPart = tuple[Any, Pieces]  # a shard's elements, for np.asarray to find on the host, and the chunks to write of it


def start(leaves: Sequence[tuple[LeafPlan, Any]]) -> list[list[Any]]:
    """Copies of what is to be written of leaves on accelerators (`off_host`), each leaf's shards: on their way to the
    host, all of them at once, in this order. JAX runs what donates the leaves after the copies. Shards for which the
    platform has no page-locked memory (XLA takes 64 GB at most, or XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB) are numpy arrays,
    and this has waited for them.
    """
    if not leaves:
        return []
    shards = [[shards_of(as_stored(plan.leaf, value))[index] for index, _ in plan.shards] for plan, value in leaves]
    try:
        return _pinned(shards)
    except _NO_ROOM:
        return [[_copy(shard) for shard in of_leaf] for of_leaf in shards]


_NO_ROOM = (ValueError, jax.errors.JaxRuntimeError)  # no such memory; no more of it


def _pinned(shards: list[list[Any]]) -> list[list[Any]]:
    targets = [[shard.sharding.with_memory_kind(PINNED_HOST) for shard in of_leaf] for of_leaf in shards]
    copies: list[list[Any]] = jax.device_put(shards, targets)
    return copies


def _copy(shard: Any) -> Any:
    try:
        return _pinned([[shard]])[0][0]
    except _NO_ROOM:
        return np.asarray(shard)


def take(plan: LeafPlan, value: Any) -> list[StagedPart]:
    """The parts of one leaf of the host's. Copies out of its own arrays, in native byte order: the caller may overwrite
    them as soon as all are taken. CPU arrays are held, not copied.
    """
    if plan.whole is not None:
        return [(np.array(value, dtype=plan.whole, order="C"), pieces) for _, pieces in plan.shards]
    held = shards_of(as_stored(plan.leaf, value))
    from_host: Any = np.array if plan.offloaded else np.asarray  # the owner may donate what is offloaded
    return [(from_host(held[index]), pieces) for index, pieces in plan.shards]


def take_small(leaves: Iterable[tuple[LeafPlan, Any]]) -> bytes:
    """The elements of all chunks of small leaves of the host's, one after the other. A copy: quicker than to hold the
    buffers, and thousands of them quickest in one go."""
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

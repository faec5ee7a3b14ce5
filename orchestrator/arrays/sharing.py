"""Loading once what several hosts hold: each replica of an array reads a part, and the devices exchange the parts.

`divided` cuts the target's sharding finer along mesh axes that the array is replicated over (data parallel groups,
slices), so that no chunk is read by two replicas; `gather` then brings every device what it is to have, over the
interconnect. Only whole chunks are shared out, so small arrays are still read by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from orchestrator.arrays.placing import Load

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
GATHER_BYTES = 1 << 30  # of arrays gathered at a time: both forms are in the devices' memory meanwhile


def divided(load: Load) -> Load:
    """The leaf on a sharding where replicas hold different chunks; the very `load` if there is nothing to share."""
    sharding, leaf = load.sharding, load.leaf
    if not isinstance(sharding, NamedSharding) or leaf.chunk is None or leaf.kind == "key" or not leaf.in_store:
        return load
    if sharding.is_fully_addressable:
        return load
    sizes = dict(sharding.mesh.shape)
    parts = [_names(entry) for entry in (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))]
    # How many chunks of each dimension a shard has; 0 where its bounds are not theirs.
    shard = sharding.shard_shape(leaf.shape)
    rows = [size // step if step and not size % step else 0 for size, step in zip(shard, leaf.chunk, strict=True)]
    for axis in [name for name, size in sizes.items() if size > 1 and not any(name in names for names in parts)]:
        number = next((at for at, count in enumerate(rows) if count and not count % sizes[axis]), None)
        if number is not None:
            parts[number] += (axis,)
            rows[number] //= sizes[axis]
    spec = PartitionSpec(*(names or None for names in parts))
    finer = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return load if finer.shard_shape(leaf.shape) == shard else replace(load, sharding=finer)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def gather(values: Sequence[Any], targets: Sequence[Any]) -> list[Any]:
    """The values on the shardings that the targets ask for, bit for bit. A collective: all processes call it with
    arrays of the same shapes, on their main threads."""
    found = list(values)
    waiting: list[int] = []
    for index, (value, target) in enumerate(zip(values, targets, strict=True)):
        wanted = getattr(target, "sharding", None)
        if (
            isinstance(value, jax.Array)
            and wanted is not None
            and not value.sharding.is_equivalent_to(wanted, value.ndim)
        ):
            waiting.append(index)
        full = sum(values[one].nbytes for one in waiting) >= GATHER_BYTES
        if waiting and (full or index == len(found) - 1):
            moved = _moved([values[one] for one in waiting], [targets[one].sharding for one in waiting])
            for one, array in zip(waiting, moved, strict=True):
                found[one] = array
            waiting = []
    return found


def _moved(arrays: list[jax.Array], shardings: list[Any]) -> list[jax.Array]:
    # As unsigned integers: backends may exchange small floats as larger ones, which changes NaNs. In three steps, so
    # that the compiler cannot put the exchange before the change of type.
    bits = jax.jit(lambda given: [_as(array, _BITS.get(array.dtype.itemsize)) for array in given])(arrays)
    there = jax.jit(lambda given: given, out_shardings=shardings)(bits)
    dtypes = [array.dtype for array in arrays]
    back = jax.jit(lambda given: [_as(*each) for each in zip(given, dtypes, strict=True)], out_shardings=shardings)
    moved: list[jax.Array] = jax.block_until_ready(back(there))
    return moved


def _as(array: jax.Array, dtype: Any) -> jax.Array:
    floats = dtype is not None and (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.floating))
    return jax.lax.bitcast_convert_type(array, dtype) if floats else array

"""Reading once what several processes want: each chunk by one of them, then the devices exchange the parts.

`groups` says which arrays of a restore are worth it, and on which shardings each process reads its slabs of them
(`dividing`); `Group.exchanged` then brings every device what it is to have, over the interconnect.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.reading.placing import Frame, ReadRequest, carrier
from orchestrator.arrays.tree import numpy_dtype
from orchestrator.rules import zarr_chunks
from orchestrator.rules.dividing import divide, is_shared, reads

GATHER_BYTES = 1 << 30  # of a device's memory for the arrays of a group: both forms are in it meanwhile
_SMALL_BYTES = 1 << 20  # smaller arrays are read by all: an exchange would take longer


@dataclass
class Group:
    """Arrays that are read, then exchanged together. `places`: of them among all loads. `wanted`: the loads as given.
    `parts`: what this process reads instead. `devices`: of all of them, in order."""

    devices: tuple[Any, ...]
    places: list[int] = field(default_factory=list)
    wanted: list[ReadRequest] = field(default_factory=list)
    parts: list[ReadRequest] = field(default_factory=list)

    @functools.cached_property
    def told(self) -> str:
        """The same on all processes if they are about to exchange the same arrays."""
        forms = [(load.leaf.name, str(_dtype(load)), str(load.sharding)) for load in self.wanted]
        frames = [(part.frame, str(part.sharding)) for part in self.parts]
        return f"{zlib.crc32(repr(([device.id for device in self.devices], forms, frames)).encode()):08x}"

    @in_own_context
    def exchanged(self, values: list[Any]) -> list[Any]:
        """The arrays on the shardings that are wanted, bit for bit, from the values of `parts`, which are let go of:
        the list is empty then. A collective: all processes call it on their main threads."""
        if not any(device.process_index == jax.process_index() for device in self.devices):
            return [_nothing(load) for load in self.wanted]
        shardings = [load.sharding for load in self.wanted]
        there = jax.jit(self._moved, out_shardings=shardings)(values)
        jax.block_until_ready(there)
        values.clear()
        # In a step of its own, so that the compiler cannot put the exchange after the change of type.
        for at, load in enumerate(self.wanted):
            dtype = _dtype(load)
            if carrier(dtype):
                there[at] = jax.block_until_ready(_back(dtype, load.sharding)(there[at]))
        return list(there)

    def _moved(self, given: list[Any]) -> list[Any]:
        moved = []
        for array, part, load in zip(given, self.parts, self.wanted, strict=True):
            assert part.frame is not None and load.sharding is not None
            stop = [first + size for first, size in zip(part.frame.start, load.leaf.shape, strict=True)]
            whole = jax.lax.slice(array, part.frame.start, stop)
            finer = _finer(load.sharding, load.leaf.shape)
            moved.append(whole if finer is None else jax.lax.with_sharding_constraint(whole, finer))
        return moved


def groups(loads: Sequence[ReadRequest]) -> list[Group]:
    """What is to be read once, in groups of bounded size; whatever is not in one is for every process to read. The same
    on all processes that give the same loads."""
    found: list[Group] = []
    held_bytes = 0
    read_bytes = [0] * jax.process_count()
    for place, load in enumerate(loads):
        if not _is_worth_it(load):
            continue
        assert load.sharding is not None and load.leaf.chunk is not None
        devices = _devices(load.sharding, load.leaf.shape)
        owners = [device.process_index for device in devices]
        chunk_bytes = math.prod(load.leaf.chunk) * _item_bytes(load)
        division = divide(load.leaf.shape, load.leaf.chunk, owners, [one / chunk_bytes for one in read_bytes], place)
        for process, count in enumerate(reads(division, load.leaf.shape, load.leaf.chunk, owners)):
            read_bytes[process] += count * chunk_bytes
        names = [f"axis{number}" for number in range(len(division.axes))]
        spec = PartitionSpec(*(tuple(names[axis] for axis in cut) or None for cut in division.cuts))
        slabs = NamedSharding(_mesh(devices, division.axes, tuple(names)), spec)
        more_bytes = _item_bytes(load) * sum(
            math.prod(shape) for shape in (division.slab, load.sharding.shard_shape(load.leaf.shape))
        )
        if not found or found[-1].devices != devices or held_bytes + more_bytes > GATHER_BYTES:
            found.append(Group(devices))
            held_bytes = 0
        held_bytes += more_bytes
        found[-1].places.append(place)
        found[-1].wanted.append(load)
        found[-1].parts.append(replace(load, sharding=slabs, frame=Frame(division.shape, division.start)))
    return found


def _is_worth_it(load: ReadRequest) -> bool:
    leaf, sharding = load.leaf, load.sharding
    if sharding is None or leaf.chunk is None or leaf.kind == "key" or not leaf.in_store:
        return False
    if math.prod(leaf.shape) * _item_bytes(load) < _SMALL_BYTES:
        return False
    devices = _devices(sharding, leaf.shape)
    if sharding.memory_kind not in (None, devices[0].default_memory().kind):
        return False
    return _is_shared(sharding, leaf.shape, leaf.chunk)


@functools.lru_cache(maxsize=256)
def _devices(sharding: Sharding, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """In the order in which a compiled program numbers them."""
    return tuple(sharding.devices_indices_map(shape))


@functools.lru_cache(maxsize=256)
def _is_shared(sharding: Sharding, shape: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
    regions: Any = sharding.devices_indices_map(shape).items()
    return is_shared(
        ((device.process_index, zarr_chunks.box_of(index or (), shape)) for device, index in regions), chunk
    )


@functools.lru_cache(maxsize=64)
def _mesh(devices: tuple[Any, ...], axes: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(devices).reshape(axes), names)


def _dtype(load: ReadRequest) -> np.dtype[Any]:
    """Of the array as it is restored."""
    return np.dtype(load.dtype or numpy_dtype(load.leaf.dtype))


def _item_bytes(load: ReadRequest) -> int:
    return _dtype(load).itemsize


def _finer(sharding: Sharding, shape: tuple[int, ...]) -> NamedSharding | None:
    """Where an array is replicated over axes of a mesh: cut along them, too, as a first stop. The compiler (jax 0.10.2)
    does not find the way from rows on all devices to replicated columns, and would have each hold the whole array."""
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)  # of axes that the compiler may use as it likes
    parts = [_names(entry) for entry in (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))]
    shard = list(sharding.shard_shape(shape))
    for axis, size in mesh.shape.items():
        at = next((at for at, length in enumerate(shard) if length % size == 0), None)
        if at is not None and not any(axis in names for names in parts):
            parts[at] += (axis,)
            shard[at] //= size
    return NamedSharding(mesh, PartitionSpec(*(names or None for names in parts)))


def _names(entry: Any) -> tuple[Any, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


@functools.lru_cache(maxsize=256)
def _back(dtype: np.dtype[Any], sharding: Sharding) -> Callable[[Any], Any]:
    """From an element's carrier."""
    bits = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits

    def back(array: Any) -> Any:
        return jax.lax.bitcast_convert_type(array if bits >= 8 else array.astype(f"uint{bits}"), dtype)

    return jax.jit(back, out_shardings=sharding)


def _nothing(load: ReadRequest) -> Any:
    """An array that other processes hold."""
    assert load.sharding is not None
    return jax.make_array_from_single_device_arrays(load.leaf.shape, load.sharding, [], dtype=_dtype(load))

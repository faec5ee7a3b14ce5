"""Reading once what several processes need: each chunk by one of them, then the devices exchange the parts.

`exchange_groups` says which arrays of a restore are worth it, and on which shardings each process reads its slabs of
them (`dividing`); `ExchangeGroup.exchanged` then brings every device its part, over the interconnect.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from orchestrator.arrays.element_types import carrier, numpy_dtype
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.memory_kinds import in_default_memory
from orchestrator.arrays.reading.dividing import Division, divide, is_shared, reads
from orchestrator.arrays.reading.requests import Frame, ReadRequest
from orchestrator.rules.boxes import box_of

GROUP_BYTES = 1 << 30  # of a device's memory for the arrays of a group: both forms are in it meanwhile
_SMALL_BYTES = 1 << 20  # smaller arrays are read by all: an exchange would take longer


@dataclass
class ExchangeGroup:
    """Arrays that are read, then exchanged together.

    devices: of all of them, in order. positions: of the arrays among all that were requested. requests: as given.
    slab_requests: what this process reads instead.
    """

    devices: tuple[Any, ...]
    positions: list[int] = field(default_factory=list)
    requests: list[ReadRequest] = field(default_factory=list)
    slab_requests: list[ReadRequest] = field(default_factory=list)

    @functools.cached_property
    def signature(self) -> str:
        """The same on all processes if they are about to exchange the same arrays."""
        forms = [(request.leaf.name, str(_dtype(request)), str(request.sharding)) for request in self.requests]
        frames = [(request.frame, str(request.sharding)) for request in self.slab_requests]
        return f"{zlib.crc32(repr(([device.id for device in self.devices], forms, frames)).encode()):08x}"

    @in_own_context
    def exchanged(self, slabs: list[Any]) -> list[Any]:
        """The arrays on the shardings that were requested, bit for bit, from the values of `slab_requests`. These are
        released: the list is empty afterwards. A collective: all processes call it on their main threads."""
        if not any(device.process_index == jax.process_index() for device in self.devices):
            return [_on_others(request) for request in self.requests]
        shardings = [request.sharding for request in self.requests]
        arrays = jax.jit(self._moved, out_shardings=shardings)(slabs)
        jax.block_until_ready(arrays)
        slabs.clear()
        # In a step of its own, so that the compiler cannot put the exchange after the change of type.
        for at, request in enumerate(self.requests):
            dtype = _dtype(request)
            if carrier(dtype):
                arrays[at] = jax.block_until_ready(_from_carrier(dtype, request.sharding)(arrays[at]))
        return list(arrays)

    def _moved(self, slabs: list[Any]) -> list[Any]:
        moved = []
        for array, slab, request in zip(slabs, self.slab_requests, self.requests, strict=True):
            assert slab.frame is not None and request.sharding is not None
            stop = [first + size for first, size in zip(slab.frame.start, request.leaf.shape, strict=True)]
            whole = jax.lax.slice(array, slab.frame.start, stop)
            finer = _finer(request.sharding, request.leaf.shape)
            moved.append(whole if finer is None else jax.lax.with_sharding_constraint(whole, finer))
        return moved


def exchange_groups(requests: Sequence[ReadRequest]) -> list[ExchangeGroup]:
    """What is to be read once, in groups of bounded size; what is in none of them is for every process to read. The
    same on all processes that make the same requests."""
    found: list[ExchangeGroup] = []
    held_bytes = 0
    read_bytes = [0] * jax.process_count()
    for position, request in enumerate(requests):
        if not _is_worth_it(request):
            continue
        leaf, sharding = request.leaf, request.sharding
        assert sharding is not None and leaf.chunk is not None
        devices = _devices(sharding, leaf.shape)
        owners = [device.process_index for device in devices]
        item_bytes = _dtype(request).itemsize
        chunk_bytes = math.prod(leaf.chunk) * item_bytes
        division = divide(leaf.shape, leaf.chunk, owners, [one / chunk_bytes for one in read_bytes], position)
        for process, count in enumerate(reads(division, leaf.shape, leaf.chunk, owners)):
            read_bytes[process] += count * chunk_bytes
        more_bytes = item_bytes * (math.prod(division.slab) + math.prod(sharding.shard_shape(leaf.shape)))
        if not found or found[-1].devices != devices or held_bytes + more_bytes > GROUP_BYTES:
            found.append(ExchangeGroup(devices))
            held_bytes = 0
        held_bytes += more_bytes
        slab = msgspec.structs.replace(
            request, sharding=_slabs(division, devices), frame=Frame(division.shape, division.start)
        )
        found[-1].positions.append(position)
        found[-1].requests.append(request)
        found[-1].slab_requests.append(slab)
    return found


def _slabs(division: Division, devices: tuple[Any, ...]) -> NamedSharding:
    """One slab of the frame for each device."""
    names = [f"axis{number}" for number in range(len(division.axes))]
    spec = PartitionSpec(*(tuple(names[axis] for axis in cut) or None for cut in division.cuts))
    return NamedSharding(_mesh(devices, division.axes, tuple(names)), spec)


def _is_worth_it(request: ReadRequest) -> bool:
    leaf, sharding = request.leaf, request.sharding
    if sharding is None or leaf.chunk is None or leaf.kind == "key" or not leaf.in_store:
        return False
    if math.prod(leaf.shape) * _dtype(request).itemsize < _SMALL_BYTES:
        return False
    return in_default_memory(sharding) and _is_shared(sharding, leaf.shape, leaf.chunk)


@functools.lru_cache(maxsize=256)
def _devices(sharding: Sharding, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """In the order in which a compiled program numbers them."""
    return tuple(sharding.devices_indices_map(shape))


@functools.lru_cache(maxsize=256)
def _is_shared(sharding: Sharding, shape: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
    regions: Any = sharding.devices_indices_map(shape).items()
    return is_shared(((device.process_index, box_of(index or (), shape)) for device, index in regions), chunk)


@functools.lru_cache(maxsize=64)
def _mesh(devices: tuple[Any, ...], axes: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(devices).reshape(axes), names)


def _dtype(request: ReadRequest) -> np.dtype[Any]:
    """Of the array as it is restored."""
    return np.dtype(request.dtype or numpy_dtype(request.leaf.dtype))


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
def _from_carrier(dtype: np.dtype[Any], sharding: Sharding) -> Callable[[Any], Any]:
    """Elements that were exchanged as their carriers, as what they are."""
    bits = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits

    def back(array: Any) -> Any:
        return jax.lax.bitcast_convert_type(array if bits >= 8 else array.astype(f"uint{bits}"), dtype)

    return jax.jit(back, out_shardings=sharding)


def _on_others(request: ReadRequest) -> Any:
    """An array that other processes hold."""
    assert request.sharding is not None
    return jax.make_array_from_single_device_arrays(request.leaf.shape, request.sharding, [], dtype=_dtype(request))

"""Where the chunks of a leaf belong on this process, and device arrays out of the buffers filled with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

# Private (jax 0.10.2): one call for all shards of an array, a tenth of device_put's time for small ones.
# tests/test_private_apis.py watches them.
from jax._src import core as _core
from jax._src.interpreters import pxla as _pxla

from orchestrator import chunks
from orchestrator.records import Box, LeafSpec
from orchestrator.tree import inline_value, numpy_dtype

_ALIGNMENT = 64  # what XLA wants of a host buffer that it takes over without a copy
_ARENA_BYTES = 1 << 20  # buffers much smaller than this share one allocation

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Load:
    """One leaf to read: where to (`sharding` None means numpy on the host) and as what dtype (None: as saved)."""

    leaf: LeafSpec
    sharding: jax.sharding.Sharding | None = None
    dtype: Any = None


@dataclass(frozen=True)
class Target:
    """Where a part of a chunk belongs: in which of the leaf's buffers and where in it, and which part it is.
    `direct`: it is the whole chunk, and contiguous in the buffer."""

    buffer: int
    inside: tuple[slice, ...]
    part: tuple[slice, ...]
    direct: bool


@dataclass(frozen=True)
class Layout:
    """What is the same for all leaves of one shape, chunk shape and sharding. `reads`: the end of each chunk's key, and
    who wants it."""

    shapes: tuple[tuple[int, ...], ...]  # of the buffers
    boxes: tuple[Box, ...]
    devices: tuple[Any, ...]  # one for each device of this process
    buffer_of: tuple[int, ...]  # and the buffer it gets
    reads: tuple[tuple[str, tuple[Target, ...]], ...]


@dataclass
class Filling:
    """A leaf being read: a host buffer for each box that this process needs."""

    item: Load
    layout: Layout
    buffers: list[Array] = field(default_factory=list)


def prepare(item: Load, layouts: dict[Any, Layout]) -> Filling:
    key = (item.sharding, item.leaf.shape, item.leaf.file_shape, item.leaf.chunk)
    layout = layouts.get(key)
    if layout is None:
        layout = layouts[key] = _layout(item)
    return Filling(item, layout)


def _layout(item: Load) -> Layout:
    shape, chunk = item.leaf.file_shape, item.leaf.chunk
    numbers: dict[Box, int] = {}
    devices, buffer_of = [], []
    if item.sharding is None:
        numbers[Box(start=(0,) * len(shape), stop=shape)] = 0
    else:
        for device, index in item.sharding.addressable_devices_indices_map(item.leaf.shape).items():
            box = chunks.box_of(index or (), shape)
            devices.append(device)
            buffer_of.append(numbers.setdefault(box, len(numbers)))
    return _fit(numbers, chunk, tuple(devices), tuple(buffer_of))


def piece_of(leaf: LeafSpec, box: Box) -> Filling:
    """A region of a leaf, as stored, in one buffer on the host."""
    return Filling(Load(leaf), _fit({box: 0}, leaf.chunk, (), ()))


def _fit(
    numbers: dict[Box, int], chunk: tuple[int, ...] | None, devices: tuple[Any, ...], buffer_of: tuple[int, ...]
) -> Layout:
    """Which chunks the boxes, with the numbers of their buffers, need."""
    wanted: dict[Box, list[Target]] = {}
    for box, number in numbers.items() if chunk is not None else ():
        for one in chunks.touching(box, chunk or ()):
            common = chunks.overlap(box, one)
            inside = chunks.within(common, box)
            direct = common == one and _contiguous(common, box)
            target = Target(number, inside, chunks.within(common, one), direct)
            wanted.setdefault(one, []).append(target)
    return Layout(
        shapes=tuple(chunks.shape_of(box) for box in numbers),
        boxes=tuple(numbers),
        devices=devices,
        buffer_of=buffer_of,
        reads=tuple((chunks.suffix(one, chunk or ()), tuple(targets)) for one, targets in wanted.items()),
    )


def _contiguous(box: Box, outer: Box) -> bool:
    """Whether `box` is one run of elements of an array that holds `outer`, in C order."""
    sizes = [
        (stop - start, last - first)
        for start, stop, first, last in zip(box.start, box.stop, outer.start, outer.stop, strict=True)
    ]
    while sizes and sizes[0][0] == 1:
        sizes = sizes[1:]
    return all(size == whole for size, whole in sizes[1:])


class Arena:
    """Aligned buffers. Small ones share an allocation, which lives as long as any of them."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        if size > _ARENA_BYTES // 8:
            return _aligned(size).view(dtype).reshape(shape)
        if self._used + size > len(self._memory):
            self._memory, self._used = _aligned(_ARENA_BYTES), 0
        raw = self._memory[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return raw.view(dtype).reshape(shape)


def _aligned(size: int) -> Array:
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size]


def finish(loads: Sequence[Load], fillings: dict[int, Filling]) -> list[Any]:
    """The values, in order."""
    values: list[Any] = []
    for index, item in enumerate(loads):
        filling = fillings.get(index)
        if filling is None:
            values.append(_empty_array(item) if item.leaf.kind_stored else inline_value(item.leaf))
            continue
        logical = [_logical(item, buffer) for buffer in filling.buffers]
        if item.sharding is None:
            values.append(logical[0][()] if item.leaf.kind == "numpy_scalar" else logical[0])
        else:
            values.append(_on_devices(item, item.sharding, filling.layout, logical))
        filling.buffers = []  # on another device than the host's, they are not needed any more
    return values


def _logical(item: Load, data: Array) -> Array:
    """Stored bytes as the user's dtype, then cast if asked."""
    leaf = item.leaf
    if leaf.kind != "key" and leaf.stored_dtype:
        data = data.view(numpy_dtype(leaf.dtype))
    return data if item.dtype is None or data.dtype == item.dtype else data.astype(item.dtype)


def _on_devices(item: Load, sharding: jax.sharding.Sharding, layout: Layout, buffers: list[Array]) -> Any:
    """The array of one leaf. A CPU device takes the buffers over as they are."""
    leaf = item.leaf
    hosts = [buffers[number] for number in layout.buffer_of]
    # Arrays of JAX's canonical types only: int64 becomes int32 where x64 is off, as in device_put.
    dtype = jax.dtypes.canonicalize_dtype(hosts[0].dtype)
    if dtype != hosts[0].dtype:
        hosts = [host.astype(dtype) for host in hosts]
    aval = _core.ShapedArray(leaf.file_shape, dtype)
    array = _pxla.batched_device_put(aval, sharding, hosts, layout.devices)
    return jax.random.wrap_key_data(array, impl=leaf.value) if leaf.kind == "key" else array


def _empty_array(item: Load) -> Any:
    """An array with no elements, from its spec alone."""
    leaf = item.leaf
    dtype = item.dtype or (leaf.stored_dtype if leaf.kind == "key" else None) or leaf.dtype
    host = np.zeros(leaf.file_shape, numpy_dtype(str(dtype)) if isinstance(dtype, str) else dtype)
    if item.sharding is None:
        return host
    array = jax.make_array_from_callback(leaf.file_shape, item.sharding, lambda index: host[index])
    return jax.random.wrap_key_data(array, impl=leaf.value) if leaf.kind == "key" else array

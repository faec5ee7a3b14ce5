"""Where the chunks of a leaf belong on this process, and device arrays out of the buffers filled with them."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

# Private (jax 0.10.2): one call for all shards of an array, a tenth of device_put's time for small ones.
# tests/arrays/test_private_apis.py watches them.
from jax._src import core as _core
from jax._src.lib import xla_client as _xla  # type: ignore[attr-defined]

from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.leaf_errors import about
from orchestrator.arrays.reading import owned_memory
from orchestrator.arrays.tree import inline_value, numpy_dtype
from orchestrator.errors import Damaged, UsageError
from orchestrator.rules import zarr_chunks
from orchestrator.rules.records import Box, LeafSpec

_ALIGNMENT = 64  # what XLA wants of a host buffer that it takes over without a copy
_ARENA_BYTES = 1 << 20  # buffers much smaller than this share one allocation
_SMALL_BYTES = _ARENA_BYTES // 8
_PAGE_BYTES = 2 << 20  # a large page
_LARGE_BYTES = 2 * _PAGE_BYTES
_LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}

_THREADS = 8  # at most, that copy replicas
_COPIED = _xla.HostBufferSemantics.IMMUTABLE_ONLY_DURING_CALL
_TAKEN_OVER = _xla.HostBufferSemantics.ZERO_COPY

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Frame:
    """A larger array that a leaf is read into, at `start`, to be exchanged: what lies around the leaf is not read, and
    the elements come as their `carrier`."""

    shape: tuple[int, ...]
    start: tuple[int, ...]


@dataclass(frozen=True)
class ReadRequest:
    """One leaf to read: where to (`sharding` None means numpy on the host; it is the frame's, if there is one) and as
    what dtype (None: as saved)."""

    leaf: LeafSpec
    sharding: jax.sharding.Sharding | None = None
    dtype: Any = None
    frame: Frame | None = None


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
class BufferGroup:
    """Leaves of one form being read: for each box that this process needs a host buffer, whose first dimension is the
    leaf. `places`: of the leaves, among all that are wanted. `owned`: the arrays on each device whose memory the
    buffers are, if those are to be the leaf; `replicas`: (to, from) of devices that get the same bytes."""

    items: Sequence[ReadRequest]
    layout: Layout
    places: Sequence[int] = (0,)
    buffers: list[Array] = field(default_factory=list)
    owned: list[Any] = field(default_factory=list)
    replicas: list[tuple[Array, Array]] = field(default_factory=list)

    @property
    def leaf(self) -> LeafSpec:
        """One for all, but for its path."""
        return self.items[0].leaf

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return numpy_dtype(self.leaf.stored_dtype or self.leaf.dtype)

    @property
    def leaf_bytes(self) -> int:
        """Of the buffers of one leaf."""
        return sum(_step(math.prod(shape) * self.dtype.itemsize) for shape in self.layout.shapes)

    @property
    def bytes(self) -> int:
        """Of all its buffers."""
        return len(self.items) * self.leaf_bytes

    @property
    def dtype_held(self) -> np.dtype[Any]:
        """Of the restored array."""
        return np.dtype(_logical(self.items[0], np.empty(0, self.dtype)).dtype)

    @property
    def ownable(self) -> bool:
        """Whether its buffers can be memory of XLA's own that becomes the arrays, and are large enough for it."""
        item = self.items[0]
        if item.sharding is None or item.frame or not self.layout.devices or self.leaf_bytes < owned_memory.ARRAY_BYTES:
            return False
        here = on_host(item.sharding) and in_own_memory(item.sharding)
        as_read = self.dtype_held == _logical(ReadRequest(self.leaf), np.empty(0, self.dtype)).dtype  # it is not cast
        whole = owned_memory.bit_count(self.dtype_held) >= 8  # XLA may pack others
        return here and as_read and whole and len(self.items) == 1 and len(set(self.layout.shapes)) == 1

    @property
    def copied(self) -> bool:
        """Whether the buffers are copied to an accelerator's memory; else to the host's, or they become the arrays."""
        sharding = self.items[0].sharding
        return sharding is not None and not on_host(sharding)

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.leaf.chunk or ()) * self.dtype.itemsize


@functools.lru_cache(maxsize=256)
def on_host(sharding: jax.sharding.Sharding) -> bool:
    """Whether its devices are CPUs, whose arrays lie where numpy's do."""
    device: Any = next(iter(sharding.device_set))
    return bool(device.platform == "cpu")


@functools.lru_cache(maxsize=256)
def in_own_memory(sharding: jax.sharding.Sharding) -> bool:
    """Whether its arrays are where the devices have theirs by default; else in host memory that belongs to them."""
    device: Any = next(iter(sharding.device_set))
    return sharding.memory_kind in (None, device.default_memory().kind)


def prepare(loads: Sequence[ReadRequest]) -> list[BufferGroup]:
    """The leaves that files hold. A large one comes alone, small ones of one form come together: then what there is to
    do is done for all of them at once."""
    forms: dict[Any, list[int]] = {}
    for place, item in enumerate(loads):
        leaf = item.leaf
        if leaf.in_store:
            form = (leaf.shape, leaf.dtype, leaf.chunk, item.sharding, item.dtype, leaf.kind, leaf.stored_shape)
            forms.setdefault((*form, leaf.stored_dtype, leaf.value, item.frame), []).append(place)
    fillings = []
    for places in forms.values():
        alone = BufferGroup((loads[places[0]],), _layout(loads[places[0]]))
        count = max(1, _SMALL_BYTES // max(1, alone.leaf_bytes))
        for first in range(0, len(places), count):
            some = places[first : first + count]
            fillings.append(BufferGroup([loads[place] for place in some], alone.layout, some))
    return sorted(fillings, key=lambda filling: filling.places[0])  # about as the files have them


def own(fillings: Sequence[BufferGroup]) -> None:
    """Have the large ones among those for CPU devices read straight into what will be the arrays, if there is enough
    of them. Main thread. Raises MemoryError."""
    by_devices: dict[tuple[Any, ...], list[BufferGroup]] = {}
    for filling in fillings:
        if filling.ownable:
            by_devices.setdefault(filling.layout.devices, []).append(filling)
    for devices, some in by_devices.items():
        size = len(devices) * sum(filling.leaf_bytes // len(filling.layout.shapes) for filling in some)
        if size < owned_memory.TOTAL_BYTES:
            continue
        reserve(size)  # XLA would end the process
        made = owned_memory.allocate(devices, [(filling.layout.shapes[0], filling.dtype_held) for filling in some])
        for filling, arrays in zip(some, made or (), strict=False):
            _read_into(filling, arrays)


def _read_into(filling: BufferGroup, arrays: list[Any]) -> None:
    filling.owned = arrays
    views = [owned_memory.memory(array).view(filling.dtype).reshape(1, *array.shape) for array in arrays]
    first: dict[int, Array] = {}
    for number, view in zip(filling.layout.buffer_of, views, strict=True):
        if first.setdefault(number, view) is not view:
            filling.replicas.append((view, first[number]))
    filling.buffers = [first[number] for number in range(len(filling.layout.shapes))]


def _layout(item: ReadRequest) -> Layout:
    shape, chunk = item.leaf.file_shape, item.leaf.chunk
    whole = Box(start=(0,) * len(shape), stop=shape)
    numbers: dict[Box, int] = {}
    devices, buffer_of = [], []
    if item.sharding is None:
        numbers[whole] = 0
    else:
        frame = item.frame or Frame(item.leaf.shape, whole.start)
        sizes = (*frame.shape, *shape[len(frame.shape) :])
        for device, index in item.sharding.addressable_devices_indices_map(frame.shape).items():
            box = zarr_chunks.moved(zarr_chunks.box_of(index or (), sizes), frame.start)
            devices.append(device)
            buffer_of.append(numbers.setdefault(box, len(numbers)))
    return _fit(numbers, chunk, tuple(devices), tuple(buffer_of), whole)


def recut(layout: Layout, leaf: LeafSpec, chunk: tuple[int, ...]) -> Layout:
    """The layout of an array whose chunk shape only its own metadata has told."""
    whole = Box(start=(0,) * len(leaf.file_shape), stop=leaf.file_shape)
    numbers = {box: number for number, box in enumerate(layout.boxes)}
    return _fit(numbers, chunk, layout.devices, layout.buffer_of, whole)


def piece_of(leaf: LeafSpec, box: Box) -> BufferGroup:
    """A region of a leaf, as stored, in one buffer on the host."""
    return BufferGroup((ReadRequest(leaf),), _fit({box: 0}, leaf.chunk, (), (), box))


def _fit(
    numbers: dict[Box, int],
    chunk: tuple[int, ...] | None,
    devices: tuple[Any, ...],
    buffer_of: tuple[int, ...],
    whole: Box,
) -> Layout:
    """Which chunks the boxes, with the numbers of their buffers, need. What is outside `whole` is not filled."""
    wanted: dict[Box, list[Target]] = {}
    for box, number in numbers.items() if chunk is not None else ():
        filled = zarr_chunks.overlap(box, whole)
        if any(start >= stop for start, stop in zip(filled.start, filled.stop, strict=True)):
            continue
        covered = 0
        for one in zarr_chunks.touching(filled, chunk or ()):
            common = zarr_chunks.overlap(filled, one)
            inside = zarr_chunks.within(common, box)
            direct = common == one and _contiguous(common, box)
            target = Target(number, inside, zarr_chunks.within(common, one), direct)
            wanted.setdefault(one, []).append(target)
            covered += math.prod(zarr_chunks.shape_of(common))
        # Memory that nothing is read into holds whatever was there before.
        if covered != math.prod(zarr_chunks.shape_of(filled)):
            raise Damaged(f"chunks of {chunk} cover {covered} elements of the region {filled}; not read")
    return Layout(
        shapes=tuple(zarr_chunks.shape_of(box) for box in numbers),
        boxes=tuple(numbers),
        devices=devices,
        buffer_of=buffer_of,
        reads=tuple((zarr_chunks.suffix(one, chunk or ()), tuple(targets)) for one, targets in wanted.items()),
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

    def arrays(self, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """`count` arrays, each aligned, in one of a dimension more."""
        size = math.prod(shape) * dtype.itemsize
        step = _step(size)
        rows = self._take(count * step).reshape(count, step)[:, :size]
        return rows.view(dtype).reshape(count, *shape)

    def _take(self, size: int) -> Array:
        if size >= _LARGE_BYTES:
            return _in_large_pages(size)
        if size > _SMALL_BYTES:
            return _aligned(size)
        if self._used + size > len(self._memory):
            self._memory, self._used = _aligned(_ARENA_BYTES), 0
        self._used += size
        return self._memory[self._used - size : self._used]


class Slab(Arena):
    """Aligned buffers in one allocation, for arrays that are copied to accelerators: fresh memory for all of them would
    cost more time than the copies, and as much memory as the state has."""

    def reset(self, size: int) -> None:
        """From now on its `size` bytes are handed out, those that are in use too."""
        if size > len(self._memory):
            self._memory = _in_large_pages(size)
        self._used = 0

    def _take(self, size: int) -> Array:
        self._used += size
        assert self._used <= len(self._memory)
        return self._memory[self._used - size : self._used]


def _step(size: int) -> int:
    """From one buffer of `size` bytes to the next."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned(size: int) -> Array:
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size]


def _in_large_pages(size: int) -> Array:
    """Memory of its own, in large pages where Linux gives them. numpy asks for them too, but begins anywhere: 2 MiB of
    each array would be in small ones, each with a page fault of its own."""
    try:
        memory = mmap.mmap(-1, size + _PAGE_BYTES, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes for an array: {error}") from error
    raw = np.frombuffer(memory, np.uint8)
    first = -raw.ctypes.data % _PAGE_BYTES
    if _LARGE_PAGES is not None:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(_LARGE_PAGES, first, size // _PAGE_BYTES * _PAGE_BYTES)
    return raw[first : first + size]


def reserve(size: int) -> None:
    """Whether so much could be had. A library that decodes into memory of its own ends the process if it could not.
    Raises MemoryError."""
    if size > _ARENA_BYTES:
        _in_large_pages(size)


@in_own_context
def place(fillings: Sequence[BufferGroup], values: list[Any]) -> list[Any]:
    """Put the values of leaves that were read where they belong in `values`, and return them."""
    placed = []
    if replicas := [pair for filling in fillings for pair in filling.replicas]:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="replicas") as pool:
            list(pool.map(lambda pair: np.copyto(*pair), replicas))
    for filling in fillings:
        with about(filling.leaf):
            made = _values(filling)
        for at, value in zip(filling.places, made, strict=True):
            values[at] = value
        placed += made
        filling.buffers, filling.replicas, filling.owned = [], [], []  # not needed any more
    return placed


@in_own_context
def unread(item: ReadRequest) -> Any:
    """The value of a leaf that no file holds."""
    return _empty_array(item) if item.leaf.kind_stored else inline_value(item.leaf)


def _values(filling: BufferGroup) -> list[Any]:
    """The values of leaves of one form. A CPU device takes the buffers over as they are."""
    item, leaf = filling.items[0], filling.leaf
    logical = [_logical(item, data) for data in filling.buffers]
    rows = range(len(filling.items))
    if item.sharding is None:
        return [logical[0][row, ...][()] if leaf.kind == "numpy_scalar" else logical[0][row, ...] for row in rows]
    dtype = filling.dtype_held  # a process that has none of the devices has no buffers
    if item.frame and (carried := carrier(dtype)):
        dtype, logical = carried, [data.view(carried) for data in logical]
    aval = _core.ShapedArray(item.frame.shape if item.frame else leaf.file_shape, dtype)
    layout, devices = filling.layout, list(filling.layout.devices)
    if filling.owned:
        values = [jax.make_array_from_single_device_arrays(aval.shape, item.sharding, filling.owned)]
        return [_key(values[0], leaf)] if leaf.kind == "key" else values
    # To a CPU device by a copy, so that the array can be donated. What is exchanged never is.
    how = _COPIED if on_host(item.sharding) and not item.frame else _TAKEN_OVER
    values = []
    for row in rows:
        hosts = [data[row, ...] for data in logical]
        shards = [hosts[number] for number in layout.buffer_of]
        if how is _COPIED and len(shards) > len(hosts) > 1:
            shards = _apart(shards)
        values.append(_xla.batched_device_put(aval, item.sharding, shards, devices, True, False, how))
    return [_key(value, leaf) for value in values] if leaf.kind == "key" else values


def _apart(shards: list[Array]) -> list[Array]:
    """With memory of its own for each: jaxlib 0.10.2 fails (bad_function_call) to copy shards for several devices some
    of which share their memory."""
    first = {id(shard): number for number, shard in reversed(list(enumerate(shards)))}
    return [shard if first[id(shard)] == number else shard.copy() for number, shard in enumerate(shards)]


def _key(data: Any, leaf: LeafSpec) -> Any:
    try:
        return jax.random.wrap_key_data(data, impl=leaf.value)
    except (ValueError, TypeError) as error:
        text = f"{leaf.label}: keys of implementation {leaf.value!r} cannot be made of {leaf.stored_shape}"
        raise UsageError(f"{text} by this JAX; define it first: {error}") from error


def carrier(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The unsigned integers that elements of `dtype` are exchanged as; None: as they are. Backends may exchange small
    floats as larger ones, which changes NaNs, and know little of elements of less than a byte."""
    small = dtype.kind in "fV" and dtype.itemsize <= 4  # numpy's own floats, and those of ml_dtypes
    return np.dtype(f"u{dtype.itemsize}") if small else None


def _logical(item: ReadRequest, data: Array) -> Array:
    """Stored bytes as the user's dtype, then cast if asked."""
    leaf = item.leaf
    if leaf.kind != "key" and leaf.stored_dtype:
        data = data.view(numpy_dtype(leaf.dtype))
    return data if item.dtype is None or data.dtype == item.dtype else data.astype(item.dtype)


@in_own_context
def as_array(leaf: LeafSpec, value: Any, dtype: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A number that was saved as another kind of leaf as an array without dimensions; numpy's where `sharding` is
    None. Raises UsageError naming the leaf if `dtype` cannot hold it."""
    try:
        host = np.asarray(value, dtype)
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"{leaf.label}: {value!r} cannot be held as {dtype}: {error}; ask for a wider dtype"
        ) from error
    return host if sharding is None else _spread(host, sharding)


def _spread(host: Array, sharding: jax.sharding.Sharding) -> Any:
    """An array that every process has on its host, on the devices of `sharding`, which may be other processes'."""
    dtype = jax.dtypes.canonicalize_dtype(host.dtype)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index], dtype=dtype)


def _empty_array(item: ReadRequest) -> Any:
    """An array with no elements, from its spec alone."""
    leaf = item.leaf
    dtype = item.dtype or (leaf.stored_dtype if leaf.kind == "key" else None) or leaf.dtype
    host = np.zeros(leaf.file_shape, numpy_dtype(str(dtype)) if isinstance(dtype, str) else dtype)
    if item.sharding is None:
        return host
    array = _spread(host, item.sharding)
    return _key(array, leaf) if leaf.kind == "key" else array

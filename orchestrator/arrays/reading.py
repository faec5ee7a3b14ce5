"""Reading leaves of an attempt's `state/`, onto any mesh, any process count, or into numpy.

Chunks are read as objects of the OCDBT store, all of them in one bounded window, checked against their CRC-32C and
copied to where they belong; the buffers filled so become the device arrays. An array whose chunks are not ours (leaf
without `chunk`: compressed, or written by another Orbax) is read through TensorStore's zarr3 driver.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import crc32c
import jax
import numpy as np
import tensorstore as ts

from orchestrator import chunks
from orchestrator.arrays.store import context, foreign_spec, store_spec
from orchestrator.errors import Damaged, OrchestratorError, StorageError, WaitTimeout
from orchestrator.records import Box, Foreign, LeafSpec
from orchestrator.tree import inline_value, numpy_dtype

_WINDOW_BYTES = 64 << 20  # read and not yet copied to their place
_WINDOW_READS = 2048
_ALIGNMENT = 64  # what XLA wants of a host buffer that it takes over without a copy
_INLINE_BYTES = 1 << 20  # chunks up to this are checked and copied at once, larger ones on threads
_THREADS = 4
_TIMEOUT_S = 600.0  # for any one read
_CHECK_READS = 16  # under way at once while checking

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Load:
    """One leaf to read: where to (`sharding` None means numpy on the host) and as what dtype (None: as saved)."""

    leaf: LeafSpec
    sharding: jax.sharding.Sharding | None = None
    dtype: Any = None


@dataclass
class _Filling:
    """A leaf being read: a host buffer for each box that this process needs, and the devices that want it."""

    item: Load
    buffers: dict[Box, Array] = field(default_factory=dict)
    devices: dict[Box, list[Any]] = field(default_factory=dict)


def load(
    directory: str,
    loads: Sequence[Load],
    on_bytes: Callable[[int], None] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> list[Any]:
    """Read leaves of the `state/` at URL `directory`, in order, concurrently; each process reads what it needs.

    Works on any mesh and process count. `on_bytes` is told of bytes as they arrive, for progress displays. `checksums`:
    the manifest's of each chunk; without them another save's chunk cannot be told from this one's.
    Raises Damaged naming the leaf if it cannot be read or a checksum is wrong, WaitTimeout if there is no answer.
    """
    fillings = {index: _prepare(item) for index, item in enumerate(loads) if item.leaf.in_store}
    if fillings:
        reader = _Reader(directory, on_bytes or (lambda read_bytes: None), checksums or {})
        reader.fill(list(fillings.values()))
    return _finish(loads, fillings)


def check(
    directory: str, checksums: Mapping[str, str], on_bytes: Callable[[int], None] = lambda read_bytes: None
) -> dict[str, str]:
    """Read these chunks (key -> the manifest's CRC-32C) of the `state/` at URL `directory`. By key: what is wrong with
    each that is not what was saved. Holds a few at a time. Raises Damaged if the store cannot be opened, StorageError,
    WaitTimeout."""
    return _Reader(directory, on_bytes, checksums).check()


def _prepare(item: Load) -> _Filling:
    leaf = item.leaf
    shape = leaf.file_shape
    dtype = numpy_dtype(leaf.stored_dtype or leaf.dtype)
    filling = _Filling(item)
    if item.sharding is None:
        filling.buffers[Box(start=(0,) * len(shape), stop=shape)] = _aligned(shape, dtype)
        return filling
    for device, index in item.sharding.addressable_devices_indices_map(leaf.shape).items():
        box = chunks.box_of(index or (), shape)
        filling.devices.setdefault(box, []).append(device)
    for box in filling.devices:
        filling.buffers[box] = _aligned(chunks.shape_of(box), dtype)
    return filling


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


# TensorStore's statuses that say something about the store, and nothing about what is in it.
_STORE_FAILED = (
    *("UNAVAILABLE", "PERMISSION_DENIED", "UNAUTHENTICATED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"),
    *("ABORTED", "CANCELLED"),
)


def _fault(error: Exception) -> type[OrchestratorError]:
    """Whether a failed read means that the store failed, or that the data is damaged."""
    return StorageError if str(error).startswith(_STORE_FAILED) else Damaged


@dataclass(frozen=True)
class _Read:
    leaf: LeafSpec
    chunk: Box
    bytes: int
    targets: tuple[tuple[Box, Array], ...]

    @property
    def key(self) -> str:
        assert self.leaf.chunk is not None
        return chunks.key(self.leaf.name, self.chunk, self.leaf.chunk)


def _reads(filling: _Filling) -> Iterator[_Read]:
    """Each chunk once, with all the buffers that want some of it."""
    leaf = filling.item.leaf
    assert leaf.chunk is not None
    wanted: dict[Box, list[tuple[Box, Array]]] = {}
    for box, buffer in filling.buffers.items():
        for chunk in chunks.touching(box, leaf.chunk):
            wanted.setdefault(chunk, []).append((box, buffer))
    size = _chunk_bytes(leaf)
    for chunk, targets in wanted.items():
        yield _Read(leaf, chunk, size, tuple(targets))


class _Reader:
    def __init__(self, directory: str, on_bytes: Callable[[int], None], checksums: Mapping[str, str]) -> None:
        self._directory, self._on_bytes, self._context = directory, on_bytes, context()
        self._checksums = checksums

    @functools.cached_property
    def _store(self) -> Any:
        try:
            return ts.KvStore.open(store_spec(self._directory), context=self._context).result(timeout=_TIMEOUT_S)
        except (ValueError, OSError) as error:
            raise _fault(error)(f"{self._directory}: cannot be opened: {error}") from error

    def fill(self, fillings: Sequence[_Filling]) -> None:
        ours = [filling for filling in fillings if filling.item.leaf.chunk is not None]
        self._fill_chunks(read for filling in ours for read in _reads(filling))
        for filling in fillings:
            if filling.item.leaf.chunk is None:
                self._fill_by_zarr(filling)

    def _fill_chunks(self, reads: Iterator[_Read]) -> None:
        waiting: deque[tuple[_Read, Any]] = deque()
        placing: deque[Future[None]] = deque()
        in_flight = 0
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="restore") as pool:
            for read in reads:
                while waiting and (in_flight + read.bytes > _WINDOW_BYTES or len(waiting) >= _WINDOW_READS):
                    in_flight -= self._take(waiting, placing, pool)
                waiting.append((read, self._store.read(read.key)))
                in_flight += read.bytes
            while waiting:
                self._take(waiting, placing, pool)
            for placed in placing:
                placed.result()

    def _take(self, waiting: deque[tuple[_Read, Any]], placing: deque[Future[None]], pool: ThreadPoolExecutor) -> int:
        """Take the oldest read and put its bytes where they belong. Returns its size."""
        read, future = waiting.popleft()
        body = self._result(read.leaf, future)
        self._on_bytes(read.bytes)
        if read.bytes <= _INLINE_BYTES:
            self._place(read, body)
        else:
            placing.append(pool.submit(self._place, read, body))
            if len(placing) > 2 * _THREADS:  # else their bodies would pile up outside the window
                placing.popleft().result()
        return read.bytes

    def _result(self, leaf: LeafSpec, future: Any) -> Any:
        try:
            result = future.result(timeout=_TIMEOUT_S)
        except TimeoutError as error:
            raise WaitTimeout(f"{leaf.label}: {self._directory} did not answer within {_TIMEOUT_S:g} s") from error
        except (ValueError, OSError, NotImplementedError) as error:  # TensorStore's statuses arrive as these
            raise _fault(error)(f"{leaf.label}: cannot be read from {self._directory}: {error}") from error
        return result

    def _place(self, read: _Read, result: Any) -> None:
        leaf, body = read.leaf, result.value
        wanted = read.bytes
        if result.state != "value":
            raise Damaged(f"{leaf.label}: chunk {read.key} is missing in {self._directory}")
        if len(body) != wanted + chunks.CHECKSUM_BYTES:
            raise Damaged(
                f"{leaf.label}: chunk {read.key} in {self._directory} has {len(body)} bytes, wanted "
                f"{wanted + chunks.CHECKSUM_BYTES}"
            )
        raw = memoryview(body)[:wanted]
        got, said = crc32c.crc32c(raw), int.from_bytes(body[wanted:], "little")
        if got != said:
            raise Damaged(f"{leaf.label}: chunk {read.key} in {self._directory}: crc32c {got:08x}, written {said:08x}")
        self._same_save(leaf.label, read.key, said)
        assert leaf.chunk is not None
        for box, buffer in read.targets:
            common = chunks.overlap(box, read.chunk)
            source = np.frombuffer(raw, buffer.dtype).reshape(leaf.chunk)
            buffer[chunks.within(common, box)] = source[chunks.within(common, read.chunk)]

    def _same_save(self, label: str, key: str, said: int) -> None:
        wanted = self._checksums.get(key)
        if self._checksums and wanted != f"{said:08x}":
            raise Damaged(
                f"{label}: chunk {key} in {self._directory} ends with crc32c {said:08x}, the manifest says {wanted}; "
                "it belongs to another save"
            )

    def check(self) -> dict[str, str]:
        """Read every chunk that there is a checksum of. Key -> what is wrong with it."""
        problems: dict[str, str] = {}
        waiting: deque[tuple[str, Any]] = deque()
        keys = iter(self._checksums)
        while True:
            for key in itertools.islice(keys, _CHECK_READS - len(waiting)):
                waiting.append((key, self._store.read(key)))
            if not waiting:
                return problems
            key, future = waiting.popleft()
            try:
                result = future.result(timeout=_TIMEOUT_S)
                self._on_bytes(len(result.value))
                body = result.value if result.state == "value" else b""
                said = int.from_bytes(body[-chunks.CHECKSUM_BYTES :], "little")
                if len(body) < chunks.CHECKSUM_BYTES or crc32c.crc32c(body[: -chunks.CHECKSUM_BYTES]) != said:
                    raise Damaged(f"chunk {key} in {self._directory} is missing or damaged")
                self._same_save(key.partition("/c")[0], key, said)
            except TimeoutError as error:
                text = f"chunk {key}: {self._directory} did not answer within {_TIMEOUT_S:g} s"
                raise WaitTimeout(text) from error
            except (Damaged, ValueError, OSError) as error:
                if _fault(error) is StorageError:
                    raise StorageError(f"chunk {key}: cannot be read from {self._directory}: {error}") from error
                problems[key] = str(error)

    def _fill_by_zarr(self, filling: _Filling) -> None:
        leaf = filling.item.leaf
        foreign = leaf.foreign or Foreign(item="", driver="zarr3", ocdbt=True, name=leaf.name)
        spec = foreign_spec(f"{self._directory.rstrip('/')}/{foreign.item}", foreign)
        store = self._result(leaf, ts.open(spec, open=True, read=True, context=self._context))
        if tuple(store.shape) != leaf.file_shape:
            raise Damaged(f"{leaf.label}: the file holds {list(store.shape)}, the tree spec {list(leaf.file_shape)}")
        for box, buffer in filling.buffers.items():
            part = store[tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))]
            buffer[...] = self._result(leaf, part.read())
            self._on_bytes(buffer.nbytes)


def _chunk_bytes(leaf: LeafSpec) -> int:
    assert leaf.chunk is not None
    return math.prod(leaf.chunk) * numpy_dtype(leaf.stored_dtype or leaf.dtype).itemsize


def _finish(loads: Sequence[Load], fillings: dict[int, _Filling]) -> list[Any]:
    """The values, in order. Device arrays of all leaves are made in one call."""
    values: list[Any] = [None] * len(loads)
    hosts: list[Array] = []
    devices: list[Any] = []
    for index, item in enumerate(loads):
        filling = fillings.get(index)
        if filling is None:
            values[index] = _empty_array(item) if item.leaf.kind_stored else inline_value(item.leaf)
            continue
        for box, buffer in filling.buffers.items():
            logical = filling.buffers[box] = _logical(item, buffer)
            if item.sharding is None:
                values[index] = logical[()] if item.leaf.kind == "numpy_scalar" else logical
            for device in filling.devices.get(box, ()):
                hosts.append(logical)
                devices.append(device)
    placed = iter(jax.device_put(hosts, devices) if hosts else ())
    for index, filling in fillings.items():
        item = filling.item
        if item.sharding is not None:
            parts = [next(placed) for box in filling.buffers for _ in filling.devices[box]]
            values[index] = _assemble(item, parts)
    return values


def _logical(item: Load, data: Array) -> Array:
    """Stored bytes as the user's dtype, then cast if asked."""
    leaf = item.leaf
    if leaf.kind != "key" and leaf.stored_dtype:
        data = data.view(numpy_dtype(leaf.dtype))
    return data if item.dtype is None or data.dtype == item.dtype else data.astype(item.dtype)


def _assemble(item: Load, parts: list[Any]) -> Any:
    leaf = item.leaf
    assert item.sharding is not None
    array = jax.make_array_from_single_device_arrays(leaf.file_shape, item.sharding, parts)
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


def sharding_of(target: Any) -> jax.sharding.Sharding | None:
    """The sharding a target leaf asks for; None for numpy targets. A target without one goes to the first device."""
    if isinstance(target, np.ndarray | np.generic):
        return None
    return getattr(target, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

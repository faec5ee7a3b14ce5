"""Reading leaves of an attempt's `state/`, onto any mesh, any process count, or into numpy.

On a file system each chunk is read from its data file straight into the buffer that becomes the device array, on a few
threads, and its CRC-32C is checked there; nothing of full size lies between. What accelerators are to have goes through
two buffers of bounded size instead, one of them read into while the other is copied. Small leaves of one form are read,
checked and made into arrays together, from the store's tree that holds them. From an object store, the others are read
as objects of the OCDBT store in one bounded window. Compressed chunks take the same ways and are decoded last. An array
that another Orbax has written is read through TensorStore's zarr drivers.

Nothing is read but files that the step's manifest lists, and no buffer is given out that reads do not cover.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import crc32c
import jax
import numpy as np
import tensorstore as ts

from orchestrator import environment, gc_pause
from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.format.compressed import chunk_shape, inflated
from orchestrator.arrays.format.tensorstore_specs import (
    FAILURES,
    context,
    described,
    fault,
    files_spec,
    inspect,
    report_retries,
    stamp,
    store_spec,
)
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.reading.external import External
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.reading.placing import (
    Arena,
    BufferGroup,
    ReadRequest,
    Slab,
    Target,
    own,
    piece_of,
    place,
    prepare,
    recut,
    unread,
)
from orchestrator.arrays.reading.stored_tree import ObjectTree
from orchestrator.arrays.tree import numpy_dtype
from orchestrator.errors import Damaged, Suspect, Unavailable
from orchestrator.observe.events import Retried, emit
from orchestrator.rules import keys as layout
from orchestrator.rules import zarr_chunks
from orchestrator.rules.chunk_index import Chunk, Stored
from orchestrator.rules.records import Box, LeafSpec

_WINDOW_BYTES = 64 << 20  # read through TensorStore and not yet copied to their place
_WINDOW_READS = 2048
_THREADS = 8  # at most: half of an H100's 16 cores read and check all that its memory takes
_BATCH_BYTES = 4 << 20  # reads that one thread does in one go
_BATCH_READS = 64
_PART_BYTES = 128 << 20  # that goes to accelerators while as much is read
_PIECE_BYTES = 256 << 10  # read, and checked while it is in the cache
_WORD_S = 10.0  # while a store does not answer, this often somebody is told
_CHECK_READS = 16  # under way at once while checking
_WHOLE = crc32c.crc32c(bytes(zarr_chunks.CHECKSUM_BYTES))  # of any bytes that end with their own CRC-32C

Array = np.ndarray[Any, Any]


def load(
    directory: str,
    loads: Sequence[ReadRequest],
    on_bytes: Callable[[int], None] | None = None,
    stored: Stored | None = None,
) -> list[Any]:
    """Read leaves of the `state/` at URL `directory`, in order, concurrently; each process reads what it needs.

    Works on any mesh and process count. `on_bytes` is told of bytes as they arrive, for progress displays. `stored`:
    what the manifest lists; without it another save's chunk cannot be told from this one's.
    Raises Suspect naming the leaf if something is not as it should be, which proves nothing yet, Unavailable if it
    cannot be read.
    """
    values: list[Any] = [None if item.leaf.in_store else unread(item) for item in loads]
    with gc_pause.paused():
        fillings = prepare(loads)
    if not fillings:
        return values
    reader = _Reader(directory, on_bytes or (lambda read_bytes: None), stored)
    try:
        with _suspecting(directory):
            if held := [filling for filling in fillings if not filling.copied]:
                own(held)
                reader.fill(held, Arena())
                with gc_pause.paused():
                    place(held, values)
            _load_copied(reader, [filling for filling in fillings if filling.copied], values)
    finally:
        report_retries(directory)
    return values


@contextlib.contextmanager
def _suspecting(directory: str) -> Iterator[None]:
    """What was read once proves nothing: whatever makes no sense in it is a suspicion. A lack of memory is neither."""
    try:
        yield
    except Damaged as error:
        raise Suspect(str(error), files=error.files, chunks=error.chunks, structure=True) from error
    except MemoryError as error:
        text = f"{directory}: this process has no memory left to read arrays: {error or 'out of memory'}"
        raise Unavailable(text) from error


@in_own_context
def _load_copied(reader: _Reader, fillings: Sequence[BufferGroup], values: list[Any]) -> None:
    """Read what goes on to accelerators, a part at a time: while one is copied, the next is read into other memory."""
    memory = [(Slab(), list[Any]()) for _ in range(2)]
    for number, part in enumerate(_grouped(fillings, _PART_BYTES)):
        slab, copied = memory[number % len(memory)]
        jax.block_until_ready(copied)
        slab.reset(sum(filling.bytes for filling in part))
        reader.fill(part, slab)
        with gc_pause.paused():
            copied[:] = place(part, values)


def slabs(
    directory: str,
    leaves: Iterable[LeafSpec],
    slab_bytes: int,
    on_bytes: Callable[[int], None] | None = None,
    stored: Stored | None = None,
) -> Iterator[tuple[LeafSpec, Box, Array]]:
    """Whole arrays in pieces, checked as `load` does: (leaf, region, its elements as stored). In the order of `leaves`,
    and in C order within each: the pieces laid end to end are the array. Holds one piece of at most `slab_bytes` (one
    element at least) at a time, beside the window of reads. Leaves that no file holds are left out.
    """
    reader = _Reader(directory, on_bytes or (lambda read_bytes: None), stored)
    for leaf in leaves:
        if leaf.in_store:
            dtype = numpy_dtype(leaf.stored_dtype or leaf.dtype)
            piece = zarr_chunks.chunk_shape(leaf.file_shape, dtype.itemsize, slab_bytes)
            for box in zarr_chunks.cut(Box(start=(0,) * len(leaf.file_shape), stop=leaf.file_shape), piece):
                filling = piece_of(leaf, box)
                with _suspecting(directory):
                    reader.fill([filling], Arena())
                yield leaf, box, filling.buffers[0][0]


def check(
    directory: str,
    stored: Stored,
    on_bytes: Callable[[int], None] = lambda read_bytes: None,
    sizes: Mapping[str, int | None] | None = None,
) -> dict[str, str]:
    """Read the chunks (these, of these sizes where they are known; or all) of the `state/` at URL `directory`. By key:
    what is wrong with each that was not read as it was saved, which proves nothing yet. Holds a few at a time. Raises
    Suspect if the store is not as it should be, or its chunks are not those that the manifest has; Unavailable."""
    with _suspecting(directory):
        return _Reader(directory, on_bytes, stored).check(sizes or dict.fromkeys(stored.chunks))


@dataclass(frozen=True)
class _Read:
    """A chunk, of the leaf that is `row` among those of the filling."""

    filling: BufferGroup
    row: int
    key: str
    targets: tuple[Target, ...]
    bytes: int
    chunk: tuple[int, ...]
    compressed: bool = False

    @property
    def label(self) -> str:
        return self.filling.items[self.row].leaf.label

    def into(self, target: Target) -> Array:
        """Where the part of the chunk belongs; its first dimension is of one leaf."""
        return self.filling.buffers[target.buffer][(slice(self.row, self.row + 1), *target.inside)]


class _Reader:
    def __init__(self, directory: str, on_bytes: Callable[[int], None], stored: Stored | None) -> None:
        self._directory, self._on_bytes, self._context = directory, on_bytes, context()
        self._stored, self._checksums = stored, stored.chunks if stored else {}
        self._inspected = False
        self._stores: dict[object, tuple[Any, object]] = {}  # by spec: opened, and with whose token
        local = directory.startswith("file://")
        self._local = LocalStore(directory.removeprefix("file://"), stored) if local else None
        self._external = External(directory, self._context, stored, self._result)

    def _inspect(self) -> None:
        """Before TensorStore opens anything."""
        if not self._inspected:
            inspect(self._directory)
            self._inspected = True

    def _opened(self, spec: Callable[[str], dict[str, Any]]) -> Any:
        """The directory as TensorStore opens it by `spec`; again once another token is due."""
        opened_as = stamp(self._directory)
        store, before = self._stores.get(spec, (None, None))
        if store is None or before is not opened_as:
            self._inspect()
            try:
                store = self._awaited(ts.KvStore.open(spec(self._directory), context=self._context), self._directory)
            except FAILURES as error:
                text = f"{self._directory}: cannot be opened: {described(self._directory, error)}"
                raise fault(text, error) from error
            self._stores[spec] = store, opened_as
        return store

    @functools.cached_property
    def _places(self) -> dict[str, Chunk] | None:
        """Of our own tree; None in an object store of which nobody has listed the files. Raises Damaged, Suspect."""
        with gc_pause.paused():
            if self._local:
                places = self._local.places()
            elif self._stored is None:
                return None
            else:
                with contextlib.suppress(ocdbt.Unsupported):
                    return ObjectTree(self._directory, self._stored, self._object).places()
                places = None
        if places is None:
            raise Damaged(f"{self._directory}: the store's tree is compressed or in parts; none of ours is")
        return places

    def _object(self, path: str) -> bytes | None:
        result = self._result(f"{self._directory}/{path}", self._opened(files_spec).read(path))
        return bytes(result.value) if result.state == "value" else None

    def _chunk(self, key: str) -> Any:
        """A value, being read: from where the tree that was walked has it, or through TensorStore, which walks it."""
        place = self._places.get(key, b"") if self._places is not None and not self._local else None
        if not isinstance(place, tuple):
            return self._opened(store_spec).read(key)
        path, offset, size = place
        return self._opened(files_spec).read(path, byte_range=slice(offset, offset + size))

    def fill(self, fillings: Sequence[BufferGroup], arena: Arena) -> None:
        ours = [filling for filling in fillings if filling.leaf.external is None]
        for filling in fillings:
            count, dtype = len(filling.items), filling.dtype
            filling.buffers = filling.buffers or [arena.arrays(count, shape, dtype) for shape in filling.layout.shapes]
        if ours:
            places = self._places
            left = [filling for filling in ours if places is None or not self._fill_from_tree(filling, places)]
            if self._local and places is not None:
                self._fill_from_files(self._reads(left), self._local, places)
            else:
                self._fill_from_store(self._reads(left))
        for filling in fillings:
            if filling.leaf.external is not None:
                self._inspect()
                for row, item in enumerate(filling.items):
                    buffers = [buffer[row, ...] for buffer in filling.buffers]
                    self._external.read(item.leaf, filling.layout.boxes, buffers, self._on_bytes)

    def _reads(self, fillings: Iterable[BufferGroup]) -> Iterator[_Read]:
        """Each chunk once, with all the buffers that want some of it."""
        for filling in fillings:
            for row, item in enumerate(filling.items):
                name, chunk, layout = item.leaf.name, item.leaf.chunk, filling.layout
                if compressed := chunk is None:
                    key = zarr_chunks.metadata_key(name)
                    chunk = chunk_shape(self._value(key, item.leaf.label), item.leaf, f"{key} in {self._directory}")
                    layout = recut(layout, item.leaf, chunk)
                size = math.prod(chunk or ()) * filling.dtype.itemsize
                for suffix, targets in layout.reads:
                    yield _Read(filling, row, name + suffix, targets, size, chunk or (), compressed)

    def _value(self, key: str, label: str) -> bytes:
        """A small value of our own store. Raises Damaged if it is not there."""
        if self._places is not None:
            found = self._places.get(key)
            if isinstance(found, bytes):
                return found
        else:
            result = self._result(label, self._opened(store_spec).read(key))
            if result.state == "value":
                return bytes(result.value)
        raise Damaged(f"{label}: {key} is missing in {self._directory}")

    # From files.

    def _fill_from_tree(self, filling: BufferGroup, places: Mapping[str, Chunk]) -> bool:
        """Fill from values that the store's tree holds itself, the same chunk of all leaves at once. False if not every
        one is there, whole and of this save: reading them one by one then tells which."""
        size, chunk = filling.chunk_bytes + zarr_chunks.CHECKSUM_BYTES, filling.leaf.chunk
        if chunk is None or size > ocdbt.INLINE_BYTES:
            return False
        names = [item.leaf.name for item in filling.items]
        for suffix, targets in filling.layout.reads:
            keys = [name + suffix for name in names]
            values = [places.get(key, b"") for key in keys]
            bodies = [value for value in values if isinstance(value, bytes) and len(value) == size]
            if len(bodies) != len(keys) or any(crc32c.crc32c(body) != _WHOLE for body in bodies):
                return False
            rows = np.frombuffer(b"".join(bodies), np.uint8).reshape(len(keys), size)
            said = rows[:, : -zarr_chunks.CHECKSUM_BYTES - 1 : -1].tobytes().hex()
            if self._checksums and said != "".join([self._checksums.get(key, "") for key in keys]):
                return False
            elements = rows[:, : -zarr_chunks.CHECKSUM_BYTES].view(filling.dtype).reshape(len(keys), *chunk)
            for target in targets:
                filling.buffers[target.buffer][(slice(None), *target.inside)] = elements[(slice(None), *target.part)]
        self._on_bytes(filling.chunk_bytes * len(names) * len(filling.layout.reads))
        return True

    def _fill_from_files(self, reads: Iterator[_Read], store: LocalStore, places: Mapping[str, Chunk]) -> None:
        threads = min(_THREADS, max(2, os.cpu_count() or 1))
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="restore") as pool:
                running: deque[Any] = deque()
                for batch in _grouped(reads, _BATCH_BYTES, _BATCH_READS):
                    if batch[0].bytes * len(batch) > _PIECE_BYTES:
                        running.append((pool.submit(self._read_batch, batch, store, places), batch))
                    else:
                        self._read_batch(batch, store, places)
                        self._on_bytes(sum(read.bytes for read in batch))
                for done, batch in running:
                    done.result()
                    self._on_bytes(sum(read.bytes for read in batch))
        finally:
            store.close()

    def _read_batch(self, batch: list[_Read], store: LocalStore, places: Mapping[str, Chunk]) -> None:
        for read in batch:
            place = places.get(read.key)
            if place is None:
                raise self._suspect(read, f"chunk {read.key} is missing in {self._directory}")
            size = len(place) if isinstance(place, bytes) else place[2]
            self._check_size(read, size)
            target = read.targets[0]
            if isinstance(place, bytes):
                self._place(read, place)
            elif target.direct and len(read.targets) == 1 and not read.compressed:
                view = read.into(target).reshape(-1).view(np.uint8)
                self._check(read, *store.read_into(view.data, place, read.label))
            else:
                scratch = np.empty(size, np.uint8)  # one chunk
                split = size - zarr_chunks.CHECKSUM_BYTES
                store.read_into(scratch.data[:split], place, read.label, tail=scratch.data[split:])
                self._place(read, scratch.data)

    # From an object store.

    def _fill_from_store(self, reads: Iterator[_Read]) -> None:
        waiting: deque[tuple[_Read, Any]] = deque()
        in_flight = 0
        for read in reads:
            while waiting and (in_flight + read.bytes > _WINDOW_BYTES or len(waiting) >= _WINDOW_READS):
                in_flight -= self._take(waiting)
            waiting.append((read, self._chunk(read.key)))
            in_flight += read.bytes
        while waiting:
            self._take(waiting)

    def _take(self, waiting: deque[tuple[_Read, Any]]) -> int:
        """Take the oldest read and put its bytes where they belong. Returns its size."""
        read, future = waiting.popleft()
        result = self._result(read.label, future, [read.key])
        if result.state != "value":
            raise self._suspect(read, f"chunk {read.key} is missing in {self._directory}")
        self._check_size(read, len(result.value))
        self._place(read, result.value)
        self._on_bytes(read.bytes)
        return read.bytes

    def _result(self, label: str, future: Any, keys: Sequence[str] = ()) -> Any:
        try:
            return self._awaited(future, label)
        except FAILURES as error:
            text = f"{label}: cannot be read from {self._directory}: {described(self._directory, error)}"
            raise fault(text, error, keys) from error

    def _awaited(self, future: Any, label: str) -> Any:
        """The result, within the deadline of an operation on a store; a word in between for whoever looks on."""
        deadline_s = environment.store_deadline_s()
        waited_s = 0.0
        while True:
            try:
                return future.result(timeout=min(_WORD_S, deadline_s - waited_s))
            except TimeoutError:
                waited_s += _WORD_S
            if waited_s >= deadline_s:
                future.cancel()
                text = f"{label}: {self._directory} did not answer within {deadline_s:g} s"
                raise Unavailable(f"{text} ({environment.STORE_DEADLINE})", waited=True) from None
            emit(Retried("store", 1, "read", f"{self._directory} {label}", f"no answer for {waited_s:g} s", 0.0))

    # Both.

    def _suspect(self, read: _Read, text: str) -> Suspect:
        place = self._places.get(read.key) if self._local and self._places is not None else None
        files = self._local.files_of(place) if self._local and self._places is not None else ()
        return Suspect(f"{read.label}: {text}", files=[layout.STATE + path for path in files], chunks=[read.key])

    def _check_size(self, read: _Read, size: int) -> None:
        """Before memory is taken for it. Noise grows by less than a hundredth when it is compressed."""
        wanted = read.bytes + zarr_chunks.CHECKSUM_BYTES
        if size != wanted and not (
            read.compressed and zarr_chunks.CHECKSUM_BYTES < size <= wanted + wanted // 64 + 1024
        ):
            raise self._suspect(read, f"chunk {read.key} in {self._directory} has {size} bytes, expected {wanted}")

    def _check(self, read: _Read, got: int, said: int) -> None:
        if got != said:
            raise self._suspect(read, f"chunk {read.key} in {self._directory}: crc32c {got:08x}, written {said:08x}")
        if problem := self._another_save(read.key, said):
            raise self._suspect(read, problem)

    def _place(self, read: _Read, body: bytes | memoryview) -> None:
        """Check a chunk that lies elsewhere and copy what is wanted of it."""
        raw, tail = memoryview(body)[: -zarr_chunks.CHECKSUM_BYTES], body[-zarr_chunks.CHECKSUM_BYTES :]
        self._check(read, crc32c.crc32c(raw), int.from_bytes(tail, "little"))
        if read.compressed:
            raw = inflated(raw, read.bytes, lambda: f"{read.label}: chunk {read.key} in {self._directory}")
        source = np.frombuffer(raw, read.filling.dtype).reshape(read.chunk)
        for target in read.targets:
            read.into(target)[...] = source[target.part]

    def _another_save(self, key: str, said: int) -> str:
        wanted = self._checksums.get(key)
        if not self._checksums or wanted == f"{said:08x}":
            return ""
        where = f"chunk {key} in {self._directory}"
        return f"{where} ends with crc32c {said:08x}, the manifest says {wanted}; it belongs to another save"

    def check(self, sizes: Mapping[str, int | None]) -> dict[str, str]:
        """Read these chunks. Key -> what seems to be wrong with it."""
        self._check_keys()
        problems: dict[str, str] = {}
        waiting: deque[tuple[str, Any]] = deque()
        keys = iter(sizes)
        while True:
            for key in itertools.islice(keys, _CHECK_READS - len(waiting)):
                waiting.append((key, self._chunk(key)))
            if not waiting:
                return problems
            key, future = waiting.popleft()
            try:
                result = self._result(f"chunk {key}", future, [key])
            except Suspect as suspect:
                problems[key] = str(suspect)
                continue
            self._on_bytes(len(result.value))
            body = result.value if result.state == "value" else b""
            said = int.from_bytes(body[-zarr_chunks.CHECKSUM_BYTES :], "little")
            if len(body) < zarr_chunks.CHECKSUM_BYTES or crc32c.crc32c(body[: -zarr_chunks.CHECKSUM_BYTES]) != said:
                problems[key] = f"chunk {key} in {self._directory} is missing or damaged"
            elif (size := sizes[key] or len(body)) != len(body):
                problems[key] = f"chunk {key} in {self._directory} has {len(body)} bytes, the tree spec {size}"
            elif problem := self._another_save(key, said):
                problems[key] = problem

    def _check_keys(self) -> None:
        """The tree has the chunks that the manifest has, so that readers of either find the same."""
        there: Iterable[str] = self._places or ()
        if self._places is None:
            there = (key.decode(errors="replace") for key in self._result("the tree", self._opened(store_spec).list()))
        ours = {key for key in there if not key.endswith("/zarr.json")}
        if ours != self._checksums.keys():
            missing, unknown = sorted(self._checksums.keys() - ours), sorted(ours - self._checksums.keys())
            raise Damaged(
                f"{self._directory}: of {len(self._checksums)} chunks in the manifest, the store's tree lacks "
                f"{len(missing)} {missing[:3]}, and it has {len(unknown)} more {unknown[:3]}"
            )


_Sized = TypeVar("_Sized", _Read, BufferGroup)


def _grouped(items: Iterable[_Sized], most_bytes: int, most: int = sys.maxsize) -> Iterator[list[_Sized]]:
    """In order, of at most so many bytes and items each; a larger item comes alone."""
    group: list[_Sized] = []
    total = 0
    for item in items:
        if group and (total + item.bytes > most_bytes or len(group) >= most):
            yield group
            group, total = [], 0
        group.append(item)
        total += item.bytes
    if group:
        yield group

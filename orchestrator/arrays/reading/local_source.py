"""Chunks in files of this machine, read without TensorStore straight into the buffers, on a few threads."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.batches import batches
from orchestrator.arrays.reading.chunk_checks import ChunkChecks
from orchestrator.arrays.reading.chunk_parts import ChunkParts
from orchestrator.arrays.reading.chunk_source import ChunkFiles, ChunkRead, OnBytes
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Location, StoredFiles
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES
from orchestrator.storage import local_path

_THREADS = 8  # at most: half of an H100's 16 cores read and check all that its memory takes
_BATCH_BYTES = 4 << 20  # reads that one thread does in one go
_BATCH_READS = 64
_INLINE_BYTES = 256 << 10  # less is read at once: handing it to a thread takes longer


class LocalSource:
    """A ChunkSource. `stored`: what the manifest lists, nothing else is read; None: nobody knows. `files`: what is read
    instead of the files in `directory`."""

    def __init__(self, directory: str, stored: StoredFiles | None, files: ChunkFiles | None = None) -> None:
        self.directory = directory
        self._store: ChunkFiles = files or LocalStore(_path(directory), stored)
        self._threads = min(_THREADS, max(2, os.cpu_count() or 1))
        self._batch_reads, self._inline_bytes = _BATCH_READS, _INLINE_BYTES
        self._checks = ChunkChecks(directory, stored.chunks if stored else {}, self._files_of)
        self._parts = ChunkParts(self._store, self._checks)
        self._pool: ThreadPoolExecutor | None = None

    def index(self) -> StoredIndex:
        return self._index

    @functools.cached_property
    def _index(self) -> StoredIndex:
        index = self._store.index()
        if index is None:
            raise Damaged(f"{self.directory}: {ocdbt.NOT_OURS}")
        return index

    def _files_of(self, key: str) -> Sequence[str]:
        return self._store.files_of(self._index.get(key))

    def value(self, key: str, label: str) -> bytes:
        found = self._index.get(key)
        if not isinstance(found, bytes):
            raise Damaged(f"{label}: {key} is missing in {self.directory}")
        return found

    def begin(self, reads: Iterator[ChunkRead], on_bytes: OnBytes) -> _Batches:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="restore")
        begun = _Batches(on_bytes)
        for batch in batches(reads, _BATCH_BYTES, self._batch_reads):
            if batch[0].bytes * len(batch) > self._inline_bytes:
                self.index()  # before the threads: from Python 3.12 on each would read it, and close the others' files
                begun.running.append(self._pool.submit(self._read, batch))
            else:
                on_bytes(self._read(batch))
        return begun

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._store.close()

    def _read(self, batch: Sequence[ChunkRead]) -> int:
        """How many bytes of elements were read. Any thread."""
        return sum(map(self._read_one, batch))

    def _read_one(self, read: ChunkRead) -> int:
        """As `_read`. Raises Suspect, StorageError."""
        place = self._index.get(read.key)
        if place is None:
            raise self._checks.missing(read)
        size = len(place) if isinstance(place, bytes) else place[2]
        self._checks.check_size(read, size)
        destination = read.destinations[0]
        if isinstance(place, bytes):
            self._checks.deliver(read, place)
        elif destination.direct and len(read.destinations) == 1 and not read.compressed:
            view = read.view(destination).reshape(-1).view(np.uint8)
            self._checks.check_crc(read, *self._elements(view.data, place, read))
        else:
            scratch = np.empty(size, np.uint8)  # one chunk
            if few := self._parts.read(read, place, scratch):
                self._checks.place(read, scratch.data[:-CHECKSUM_BYTES])
                return few
            raw = scratch.data[: size - CHECKSUM_BYTES]
            self._checks.check_crc(read, *self._elements(raw, place, read))
            self._checks.unpack(read, raw)
        return read.bytes

    def _elements(self, view: memoryview, place: Location, read: ChunkRead) -> tuple[int, int]:
        """Read a chunk's elements: their CRC-32C, and the one that was written."""
        return self._store.read_into(view, place, read.label)


def _path(directory: str) -> str:
    path = local_path(directory)
    assert path is not None, directory
    return path


class _Batches:
    """A Reading. running: what threads do; how many bytes each has read."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self.running: deque[Future[int]] = deque()
        self._on_bytes = on_bytes

    def is_done(self) -> bool:
        return all(done.done() for done in self.running)

    def result(self) -> None:
        while self.running:
            self._on_bytes(self.running.popleft().result())

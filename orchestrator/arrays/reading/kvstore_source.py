"""Chunks in an object store, read through TensorStore: as parts of objects where the manifest lists them, which spares
TensorStore the walk through the tree, else by their keys."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.chunk_checks import ChunkChecks
from orchestrator.arrays.reading.chunk_source import ChunkRead, OnBytes
from orchestrator.arrays.reading.kvstore import KvStore
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.arrays.reading.stored_tree import ObjectTree
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import StoredFiles

_WINDOW_BYTES = 64 << 20  # read, and not yet copied to their place
_WINDOW_READS = 2048


class KvStoreSource:
    """A ChunkSource. `stored`: what the manifest lists; None: nobody knows."""

    def __init__(self, directory: str, kvstore: KvStore, stored: StoredFiles | None) -> None:
        self.directory = directory
        self._kvstore, self._stored = kvstore, stored
        self._checks = ChunkChecks(directory, stored.chunks if stored else {})
        # Reads under way, the oldest first, with the future of each.
        self._waiting: deque[tuple[ChunkRead, Any, OnBytes, _Waiting]] = deque()
        self._in_flight = 0

    def index(self) -> StoredIndex | None:
        return self._index

    @functools.cached_property
    def _index(self) -> StoredIndex | None:
        if self._stored is None:
            return None
        with contextlib.suppress(ocdbt.Unsupported):
            return ObjectTree(self.directory, self._stored, self._kvstore.object).index()
        raise Damaged(f"{self.directory}: {ocdbt.NOT_OURS}")

    def value(self, key: str, label: str) -> bytes:
        found = self._index.get(key) if self._index is not None else self._value(key, label)
        if not isinstance(found, bytes):
            raise Damaged(f"{label}: {key} is missing in {self.directory}")
        return found

    def _value(self, key: str, label: str) -> bytes | None:
        result = self._kvstore.result(label, self._kvstore.begin(key))
        return bytes(result.value) if result.state == "value" else None

    def begin_read(self, key: str) -> Any:
        """A chunk, being read: a future for `KvStore.result`."""
        place = self._index.get(key) if self._index is not None else None
        return self._kvstore.begin_place(place) if isinstance(place, tuple) else self._kvstore.begin(key)

    def begin(self, reads: Iterator[ChunkRead], on_bytes: OnBytes) -> _Waiting:
        begun = _Waiting(self)
        for read in reads:
            while self._waiting and (
                self._in_flight + read.bytes > _WINDOW_BYTES or len(self._waiting) >= _WINDOW_READS
            ):
                self.take()
            self._waiting.append((read, self.begin_read(read.key), on_bytes, begun))
            self._in_flight += read.bytes
            begun.left += 1
        return begun

    def close(self) -> None:
        self._waiting.clear()
        self._in_flight = 0

    def take(self) -> None:
        """Wait for the oldest read and put its bytes where they belong."""
        read, future, on_bytes, begun = self._waiting.popleft()
        result = self._kvstore.result(read.label, future, [read.key])
        if result.state != "value":
            raise self._checks.missing(read)
        self._checks.check_size(read, len(result.value))
        self._checks.deliver(read, result.value)
        on_bytes(read.bytes)
        self._in_flight -= read.bytes
        begun.left -= 1


class _Waiting:
    """A Reading. left: how many reads the source has not taken yet."""

    def __init__(self, source: KvStoreSource) -> None:
        self._source, self.left = source, 0

    def is_done(self) -> bool:
        return not self.left

    def result(self) -> None:
        while self.left:
            self._source.take()

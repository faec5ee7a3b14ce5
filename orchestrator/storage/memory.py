"""Storage in a dict: the executable specification of the port, and the store of the model checker."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from orchestrator.errors import StorageError
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import check_key
from orchestrator.rules.records import FileEntry, crc32, crc32c
from orchestrator.storage.port import Created, Entry, Exists, TooLarge, checked_size


class MemoryStorage:
    """Objects of one process. Thread-safe."""

    url = "memory://"

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def create(self, key: str, body: bytes) -> Created | Exists:
        check_key(key, self.url)
        with self._lock:
            there = self._objects.setdefault(key, body)
        return Created() if there == body else Exists(there)

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        with self._lock:
            body = self._objects.get(key)
        if body is not None and len(body) > most_bytes:
            raise TooLarge(f"{self.url}/{key}", len(body), most_bytes)
        return body

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        with self._lock:
            found = sorted((key, len(body)) for key, body in self._objects.items())
        return (Entry(key, size) for key, size in found if key.startswith(prefix) and key >= start)

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        body = self.get(key)
        return None if body is None else FileEntry(path=key, bytes=len(body), crc32c=crc32c(body), crc32=crc32(body))

    def delete(self, key: str) -> bool:
        with self._lock:
            return self._objects.pop(key, None) is not None

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        with self._lock:
            found = [(key, self._objects.get(key)) for key in keys]
        for key, body in found:
            if body is None:
                raise StorageError(f"make_durable {self.url}{key}: no such object")
        counted = known or {}
        return tuple(
            checked_size(self.url, key, len(body), counted[key])
            if key in counted
            else FileEntry(path=key, bytes=len(body), crc32c=crc32c(body), crc32=crc32(body))
            for key, body in found
            if body is not None
        )

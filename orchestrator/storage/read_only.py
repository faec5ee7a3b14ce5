"""A store that nothing is written to: what whoever only reads a run is given, so that no method of theirs can."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from orchestrator.errors import UsageError
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry
from orchestrator.storage.port import Created, Entry, Exists, Reads, refresh


class ReadOnlyStorage:
    """`storage`, for reading. Every write raises UsageError: the one place that decides it."""

    def __init__(self, storage: Reads) -> None:
        self._storage = storage
        self.url = storage.url

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._storage.get(key, most_bytes)

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        return self._storage.list(prefix, start)

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._storage.measure(key, expected_bytes)

    def refresh(self, key: str) -> None:
        refresh(self._storage, key)

    def create(self, key: str, body: bytes) -> Created | Exists:
        raise self._rejection("create", key)

    def delete(self, key: str) -> bool:
        raise self._rejection("delete", key)

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        raise self._rejection("sync", ", ".join(keys))

    def _rejection(self, what: str, key: str) -> UsageError:
        return UsageError(f"{what} {self.url}/{key}: the run was opened read-only; nothing is written to it")

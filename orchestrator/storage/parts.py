"""The parts of many processes as one store to read: each object is asked for where its writer is, and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from orchestrator.errors import UnsafeKey
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId, receipt_file
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry
from orchestrator.storage.port import Entry, Reads

_LISTED_MAX = 32  # parts: a listing asks all of them, and is only for signals that were lost
_OF_ARRAYS = re.compile(rf"{keys.STATE}ocdbt\.process_([0-9]{{1,9}})/")


def writer_of(key: str) -> int:
    """The process that writes the object of an attempt at `key`: process 0 unless its name says another."""
    found = AttemptId.in_key(key)
    name = found[1] if found else ""
    if receipt := receipt_file(key):
        return receipt[0]
    if arrays := _OF_ARRAYS.match(name):
        return int(arrays[1])
    if name.startswith(keys.PROCESS):
        try:
            return keys.process_of(name)
        except UnsafeKey:
            return 0
    return 0


class Parts:
    """url: what messages call it. parts: of each process that is read here."""

    def __init__(self, url: str, parts: Mapping[int, Reads]) -> None:
        self.url, self._parts = url, parts

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        part = self._parts.get(writer_of(key))
        return part.get(key, most_bytes) if part else None

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        part = self._parts.get(writer_of(key))
        return part.measure(key, expected_bytes) if part else None

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        if len(self._parts) > _LISTED_MAX:
            return iter(())
        found = {entry.key: entry for part in self._parts.values() for entry in part.list(prefix, start)}
        return iter(sorted(found.values(), key=lambda entry: entry.key))

"""One process's tier and those of the others as one store: what is not in its own is read from theirs.

An attempt's files lie where their writers are. Each key has one body, wherever it is found: so sources are asked in
order, and the next one when one has not got it or cannot be read. Another process's tier need not be a directory: any
`Reads` will do. Written is to the own one only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from orchestrator.errors import StorageError
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import JOURNAL, JOURNAL_INDEX, STEPS
from orchestrator.rules.records import FileEntry
from orchestrator.storage.port import Created, Entry, Exists, Reads, Storage, check_root

Value = TypeVar("Value")


class JoinedStorage:
    """own: where this process writes. others: further sources, in the order in which they are asked. log: whose log
    counts, and whose attempts are listed; None: the own one's. Only the files of attempts are joined."""

    def __init__(self, own: Storage, others: Sequence[Reads] = (), log: Reads | None = None) -> None:
        self._own, self._sources, self._log = own, (own, *others), log or own
        self.url = own.url

    def check_root(self) -> None:
        check_root(self._own)

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._first(key, lambda source: source.get(key, most_bytes))

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._first(key, lambda source: source.measure(key, expected_bytes))

    def _first(self, key: str, ask: Callable[[Reads], Value | None]) -> Value | None:
        """What the first source says that has it. Raises what one has raised if none has it: it may be there."""
        if key.startswith((JOURNAL, JOURNAL_INDEX)):
            return ask(self._log)
        failed: StorageError | None = None
        for source in self._sources:
            try:
                if (found := ask(source)) is not None:
                    return found
            except StorageError as error:
                failed = failed or error
        if failed:
            raise failed
        return None

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        if not prefix.startswith(STEPS) or prefix == STEPS:
            return self._log.list(prefix, start)
        found: dict[str, Entry] = {}
        for source in self._sources:
            for entry in source.list(prefix, start):
                found.setdefault(entry.key, entry)
        return iter(sorted(found.values(), key=lambda entry: entry.key))

    def create(self, key: str, body: bytes) -> Created | Exists:
        return self._own.create(key, body)

    def delete(self, key: str) -> bool:
        return self._own.delete(key)

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        return self._own.make_durable(keys, known)

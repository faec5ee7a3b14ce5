"""A tier whose objects have copies on other hosts: what is written, and made durable, is there as well.

Copying is a property of the store. Whoever makes an object durable here, a receipt for one, need not know that there
are copies: it has returned when they are in. A log is not copied: each process has its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import JOURNAL, JOURNAL_INDEX
from orchestrator.rules.records import FileEntry
from orchestrator.storage.port import Created, Entry, Exists, Storage, check_root

_LOG = (JOURNAL, JOURNAL_INDEX)


class CopiedStorage:
    """own: where this process writes. send: returns when these objects are on all hosts that take copies; it raises
    StorageError, and then the objects count as not written. copies: on how many. has_log: whether the log that is asked
    for is its own one. Any thread."""

    def __init__(
        self, own: Storage, send: Callable[[Sequence[str]], None], copies: int, *, has_log: bool = True
    ) -> None:
        self._own, self._send, self._copies, self._has_log = own, send, copies, has_log
        self._lock = threading.Lock()
        self._sent: dict[AttemptId, set[str]] = {}
        self._bytes: Counter[AttemptId] = Counter()
        self.url = own.url

    def check_root(self) -> None:
        check_root(self._own)

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._own.get(key, most_bytes)

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        return self._own.list(prefix, start)

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._own.measure(key, expected_bytes)

    def delete(self, key: str) -> bool:
        return self._own.delete(key)

    def create(self, key: str, body: bytes) -> Created | Exists:
        outcome = self._own.create(key, body)
        if isinstance(outcome, Created):
            self._copy({key: len(body)})
        return outcome

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        here = [key for key in keys if self._has_log or not key.startswith(_LOG)]  # in another's memory it is as it is
        durable = self._own.make_durable(here, known)
        self._copy({key: entry.bytes for key, entry in zip(here, durable, strict=True)})
        return durable

    def _copy(self, sizes: Mapping[str, int]) -> None:
        new = {key: size for key, size in sizes.items() if not key.startswith(_LOG) and not self._was_sent(key)}
        if not new or not self._copies:
            return
        self._send(list(new))
        with self._lock:
            for key, size in new.items():
                if found := AttemptId.in_key(key):
                    self._sent.setdefault(found[0], set()).add(key)
                    self._bytes[found[0]] += size * self._copies

    def _was_sent(self, key: str) -> bool:
        found = AttemptId.in_key(key)
        with self._lock:
            return found is not None and key in self._sent.get(found[0], ())

    def sent_bytes(self, attempt: AttemptId) -> int:
        """Of an attempt that has ended, to all hosts together; it is forgotten then."""
        with self._lock:
            self._sent.pop(attempt, None)
            return self._bytes.pop(attempt, 0)

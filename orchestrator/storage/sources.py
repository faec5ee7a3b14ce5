"""Objects that lie in several places, any of which may be gone, slow, damaged or another's: each is read from the first
that gives what was written.

Who reads an object knows what it must be, by its size and checksum; who has it is known beforehand, per object. What is
wrong is reported and dropped, for that object alone, and the next source is asked. A host that does not answer at all
is asked last from then on, for every object. The last source that is left is never dropped: what it says is the answer.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry
from orchestrator.storage.port import Entry, Gone, OpenFile, OpensFiles, Reads, ReadsParts, TooLarge

Value = TypeVar("Value")

_MISSING = "is missing"


@dataclass(frozen=True, eq=False)
class Source:
    """One place. kind: what users call it. peer: the host that serves it, so that a read costs a request; '' if it is
    on this machine."""

    kind: str
    reads: Reads
    peer: str = ""

    @property
    def is_remote(self) -> bool:
        return bool(self.peer)

    @property
    def url(self) -> str:
        return self.reads.url

    def open(self, key: str) -> OpenFile:
        """Raises OSError, StorageError."""
        if isinstance(self.reads, OpensFiles):
            return _Descriptor(self.reads.open(key))
        assert isinstance(self.reads, ReadsParts), self.reads
        return _Parts(self.reads, key)


class _Descriptor:
    def __init__(self, number: int) -> None:
        self._number = number

    def read(self, view: memoryview, offset: int) -> int:
        return os.preadv(self._number, [view], offset)

    def close(self) -> None:
        os.close(self._number)


class _Parts:
    def __init__(self, reads: ReadsParts, key: str) -> None:
        self._reads, self._key = reads, key

    def read(self, view: memoryview, offset: int) -> int:
        return self._reads.read_into(self._key, offset, view)

    def close(self) -> None:
        pass


class Sources:
    """Reads of one attempt's objects. Any thread.

    url: what messages call it. of: where an object lies, in the order in which to ask; at least one. files: key ->
    bytes, of what is somewhere: a listing. on_drop: told (source, key, reason), on the thread that reads. is_remote:
    whether any of the sources is.
    """

    def __init__(
        self,
        url: str,
        of: Callable[[str], Sequence[Source]],
        files: Callable[[], Mapping[str, int]],
        on_drop: Callable[[Source, str, str], None],
        is_remote: bool = False,
    ) -> None:
        self.url, self.is_remote = url, is_remote
        self._of, self._files, self._on_drop = of, files, on_drop
        self._lock = threading.Lock()
        self._dropped: set[tuple[str, Source]] = set()
        self._silent: set[str] = set()  # hosts
        self._gave: dict[str, Source] = {}
        self._read_bytes: Counter[str] = Counter()

    # As a store.

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._ask(key, lambda source: source.reads.get(key, most_bytes))

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._ask(key, lambda source: source.reads.measure(key, expected_bytes))

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        files = self._files()
        return iter([Entry(key, files[key]) for key in sorted(files) if key.startswith(prefix) and key >= start])

    def _ask(self, key: str, ask: Callable[[Source], Value | None]) -> Value | None:
        while True:
            source = self.current(key)
            try:
                found = ask(source)
            except StorageError as error:
                if not self.drop_source(key, source, error):
                    raise
                continue
            if found is not None or not self.drop_source(key, source, _MISSING):
                self._gave[key] = source
                return found

    def drop(self, key: str, reason: str) -> bool:
        return self.drop_source(key, self._gave.get(key) or self.current(key), reason)

    # For whoever reads parts of objects.

    def current(self, key: str) -> Source:
        """Where to read it now."""
        if not self._dropped and not self._silent:
            return self._of(key)[0]
        return self._left(key)[0]

    def _left(self, key: str) -> Sequence[Source]:
        every = self._of(key)
        left = [source for source in every if (key, source) not in self._dropped]
        return sorted(left, key=lambda source: source.peer in self._silent)

    def drop_source(self, key: str, source: Source, why: Exception | str) -> bool:
        """What `source` gives for `key` is wrong, or nothing. Whether there is another to ask, also if somebody else
        has dropped it before."""
        with self._lock:
            left = self._left(key)
            if source.peer and isinstance(why, Unavailable) and not isinstance(why, TooLarge | Gone):
                self._silent.add(source.peer)
            if source not in left:
                return True
            if len(left) == 1:
                return False
            self._dropped.add((key, source))
        self._on_drop(source, key, str(why))
        return True

    def last_only(self) -> None:
        """Ask only the last source of each object from now on: before others read there without this."""
        of = self._of
        self._of = lambda key: of(key)[-1:]

    def count(self, source: Source, read_bytes: int) -> None:
        """These bytes of arrays have come from `source`, and are right."""
        with self._lock:
            self._read_bytes[source.kind] += read_bytes

    def read_bytes(self, total: int, prefix: str) -> dict[str, int]:
        """By kind of source: what `count` was told, and what it was not told of `total`: that was in objects below
        `prefix` which were read whole."""
        with self._lock:
            found = Counter(self._read_bytes)
            whole = [source.kind for key, source in self._gave.items() if key.startswith(prefix)]
        if (rest := total - found.total()) > 0 and whole:
            found[whole[-1]] += rest
        return {kind: read for kind, read in found.items() if read}

"""The run as it is stored: reading records, and the one loop that appends to the journal.

Opening and reading change nothing; a read-only credential is enough. Methods may be called from any thread.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from orchestrator import garbage, journal, layout, validate
from orchestrator.codec import AnyRecord, decode, encode
from orchestrator.errors import Damaged, Fenced, NotARun, NothingToRestore, StepNotFound, StorageError
from orchestrator.events import Retried, emit
from orchestrator.journal import FencedBy, Next, Refused, Stamp
from orchestrator.records import Extra, FileEntry, Head, Intent, LiveStep, Manifest, Receipt, crc32, crc32c, file_entry
from orchestrator.storage.base import Created, Storage

_CONFLICTS_MAX = 100
_READ_THREADS = 4  # each holds one file in memory
_CONFLICT_PAUSE_S = 0.01
_MARKED_EVERY = 500  # versions; half a page of a listing in an object store


class Catalog:
    """One run in one store. `writer` is how this process signs its journal entries."""

    def __init__(
        self,
        storage: Storage,
        writer: str,
        clock: Callable[[], float] = time.time,
        ids: Callable[[], str] | None = None,
    ) -> None:
        self.storage = storage
        self.writer = writer
        self._clock = clock
        self._ids = ids or (lambda: uuid.uuid4().hex)
        self._known_version = 0  # where to start listing: versions only grow

    @property
    def url(self) -> str:
        return self.storage.url

    def stamp(self) -> Stamp:
        return Stamp(self.writer, self._clock(), self._ids())

    # Journal.

    def head(self) -> Head | None:
        """The highest journal entry; None if there is no journal. Raises Damaged if it cannot be trusted."""
        start = self._known_version or self._indexed_version()
        versions = self._versions(start) or (self._versions(0) if start else [])
        if not versions:
            return None
        self._known_version = max(versions)
        return self.entry(self._known_version)

    def require_head(self) -> Head:
        """As `head`. Raises NotARun where there is no journal."""
        head = self.head()
        if head is None:
            raise NotARun(f"{self.url}: not a run (no journal/ in it); check the path")
        return head

    def durable_head(self) -> Head:
        """As `require_head`, and the entry survives power loss. On POSIX an entry can be read a moment before its
        writer has synced its name: nothing may be reported as saved, and nothing deleted, because of one that could
        still vanish. Raises StorageError, NotARun."""
        head = self.require_head()
        self.storage.seal([layout.journal_key(head.version)])
        return head

    def entry(self, version: int) -> Head:
        """One journal entry. Raises Damaged if it is missing, edited or in the wrong place."""
        key = layout.journal_key(version)
        return self._decode(self.storage.get(key), Head, key, version=version)

    def entries(self) -> Iterator[Head]:
        """All journal entries, oldest first."""
        return (self.entry(version) for version in sorted(self._versions(0)))

    def _versions(self, start: int) -> list[int]:
        keys = (entry.key for entry in self.storage.list(layout.JOURNAL, layout.journal_key(start)))
        return [version for key in keys if (version := layout.journal_version(key)) is not None]

    def _indexed_version(self) -> int:
        """A version that the journal has reached, from its newest marker; 0 if it has none (yet)."""
        keys = (entry.key for entry in self.storage.list(layout.JOURNAL_INDEX))
        return next((version for key in keys if (version := layout.indexed_version(key)) is not None), 0)

    def _mark(self, version: int) -> None:
        """Spare later readers the listing of old entries. A hint: without it they list more, and find the same."""
        try:
            self.storage.create(layout.index_key(version), b"")
        except StorageError as error:
            logging.warning("%s: journal version %d could not be marked: %s", self.url, version, error)

    def append(self, rule: Callable[[Head | None, Stamp], Next]) -> Head | None:
        """Apply a journal rule: read the head, compute the next, create it; if somebody was first, do it again.

        Returns the head that holds the change (the current one where the rule found nothing to do). Raises Fenced if
        a newer epoch has been opened, what the rule refuses with, and StorageError after 100 lost races.
        """
        for tries in range(1, _CONFLICTS_MAX + 1):
            head = self.head()
            match rule(head, self.stamp()):
                case None:
                    return head
                case FencedBy(epoch, writer):
                    raise Fenced(f"{self.url}: fenced by epoch {epoch}, opened by {writer}; this process must stop")
                case Refused(error):
                    raise error
                case Head() as following:
                    created = self.storage.create(layout.journal_key(following.version), encode(following))
                    if isinstance(created, Created):
                        if following.version % _MARKED_EVERY == 0:
                            self._mark(following.version)
                        return following
            wait_s = random.uniform(0, _CONFLICT_PAUSE_S)
            emit(Retried("journal", tries, wait_s=wait_s))
            time.sleep(wait_s)
        raise StorageError(f"{self.url}: lost {_CONFLICTS_MAX} races for the next journal version; too many writers")

    # Attempts.

    def newest(self, head: Head) -> LiveStep | None:
        """The restorable step committed last; None in a new run, where no step was ever committed. Raises
        NothingToRestore where there are steps and all are quarantined: that must not be taken for a new run."""
        found = journal.newest(head)
        if found is None and head.live:
            raise NothingToRestore(
                f"{self.url}: all {len(head.live)} steps are quarantined (newest: step {head.live[-1].step}); "
                f"`orchestrator log {self.url}` says why; to begin anew, use another root"
            )
        return found

    def find(self, step: int | None) -> LiveStep | None:
        """The `newest` step, or the given one. Raises NothingToRestore, StepNotFound."""
        head = self.require_head()
        if step is None:
            return self.newest(head)
        found = journal.find(head, step)
        if found is None or not found.restorable:
            have = ", ".join(str(live.step) for live in head.live if live.restorable) or "none"
            why = "is quarantined" if found else "is not in this run"
            raise StepNotFound(f"{self.url}: step {step} {why}; restorable steps: {have}")
        return found

    def key(self, step: int, attempt: str, name: str) -> str:
        """Key of a file inside an attempt; `name` is checked, it may come from storage."""
        prefix = layout.attempt_prefix(step, attempt)
        return prefix + layout.check_key(name, f"{self.url}/{prefix}{layout.MANIFEST}")

    def manifest(self, live: LiveStep) -> Manifest:
        """The manifest of a committed attempt, checked against the journal. Raises Damaged."""
        key = self.key(live.step, live.attempt, layout.MANIFEST)
        body = self.storage.get(key)
        if body is not None and crc32c(body) != live.manifest_crc32c:
            raise Damaged(f"{self.url}/{key}: crc32c is {crc32c(body)}, the journal says {live.manifest_crc32c}")
        return self._decode(body, Manifest, key, step=live.step, attempt=live.attempt)

    def check_sizes(self, live: LiveStep, manifest: Manifest) -> None:
        """Every file of the manifest is there with its size. Raises Damaged naming the first that is not."""
        prefix = layout.attempt_prefix(live.step, live.attempt)
        there = {entry.key.removeprefix(prefix): entry.bytes for entry in self.storage.list(prefix)}
        for wanted in manifest.files:
            got = there.get(wanted.path)
            if got != wanted.bytes:
                has = "is missing" if got is None else f"has {got} bytes"
                raise Damaged(f"{self.url}/{prefix}{wanted.path}: {has}, the manifest says {wanted.bytes}")

    def check_files(self, live: LiveStep, manifest: Manifest, below: str, share: tuple[int, int]) -> None:
        """Read this process's share, (index, count), of the files below a name whole, a few at a time. Raises Damaged
        naming the first that is not what the manifest says."""
        index, count = share
        mine = [entry for entry in manifest.files if entry.path.startswith(below)][index::count]
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="verify") as pool:
            for _ in pool.map(lambda entry: len(self.checked(live, entry)), mine):
                pass

    def file(self, live: LiveStep, manifest: Manifest, name: str) -> bytes | None:
        """A small file of an attempt, checked against the manifest; None if the attempt has none of that name."""
        entry = next((entry for entry in manifest.files if entry.path == name), None)
        return None if entry is None else self.checked(live, entry)

    def checked(self, live: LiveStep, entry: FileEntry) -> bytes:
        """A file of an attempt, as the manifest's `entry` says it is. Raises Damaged, StorageError."""
        key = self.key(live.step, live.attempt, entry.path)
        body = self.storage.get(key)
        if body is None:
            raise Damaged(f"{self.url}/{key}: is missing, the manifest lists it")
        if len(body) != entry.bytes or crc32c(body) != entry.crc32c:
            raise Damaged(
                f"{self.url}/{key}: {len(body)} bytes with crc32c {crc32c(body)}, "
                f"the manifest says {entry.bytes} with {entry.crc32c}"
            )
        if entry.crc32 and crc32(body) != entry.crc32:
            raise Damaged(f"{self.url}/{key}: is whole, but another file: crc32 {crc32(body)}, wanted {entry.crc32}")
        return body

    def sealed(self, live: LiveStep, entry: FileEntry) -> None:
        """As `checked`, by the store's own account: an object store knows its objects' checksums without a download."""
        key = self.key(live.step, live.attempt, entry.path)
        (found,) = self.storage.seal([key])
        if (found.bytes, found.crc32c) != (entry.bytes, entry.crc32c):
            raise Damaged(
                f"{self.url}/{key}: the store has {found.bytes} bytes with crc32c {found.crc32c}, "
                f"the manifest says {entry.bytes} with {entry.crc32c}"
            )

    def intent(self, live: LiveStep, manifest: Manifest) -> Intent:
        """Who opened the attempt, and its tree spec, whose arrays fit what the manifest lists. Raises Damaged."""
        key = self.key(live.step, live.attempt, layout.INTENT)
        body = self.file(live, manifest, layout.INTENT)
        intent = self._decode(body, Intent, key, step=live.step, attempt=live.attempt)
        try:
            validate.fits(intent, manifest)
        except validate.Invalid as error:
            raise Damaged(f"{self.url}/{key}: {error}; not used") from error
        return intent

    def extra(self, live: LiveStep, manifest: Manifest) -> Extra:
        key = self.key(live.step, live.attempt, layout.EXTRA)
        return self._decode(self.file(live, manifest, layout.EXTRA), Extra, key, step=live.step)

    def receipt(self, step: int, attempt: str, process: int) -> tuple[Receipt, FileEntry] | None:
        """The receipt of a process, and it as a file of the attempt; None if it is not written yet."""
        key = self.key(step, attempt, layout.receipt_name(process))
        body = self.storage.get(key)
        if body is None:
            return None
        receipt = self._decode(body, Receipt, key, step=step, attempt=attempt, process=process)
        return receipt, file_entry(layout.receipt_name(process), body)

    def process_states(self, live: LiveStep, manifest: Manifest) -> dict[int, bytes]:
        files = [entry for entry in manifest.files if entry.path.startswith(layout.PROCESS)]
        return {layout.process_of(entry.path): self.checked(live, entry) for entry in files}

    def attempts(self) -> dict[tuple[int, str], int]:
        """(step, attempt) -> bytes of every attempt that has data in the store, committed or not."""
        sizes: dict[tuple[int, str], int] = {}
        for entry in self.storage.list(layout.STEPS):
            found = layout.split_attempt_key(entry.key)
            if found:
                sizes[found[:2]] = sizes.get(found[:2], 0) + entry.bytes
        return sizes

    def _decode(self, body: bytes | None, kind: type[AnyRecord], key: str, **expected: object) -> AnyRecord:
        if body is None:
            raise Damaged(f"{self.url}/{key}: is missing")
        with garbage.paused():
            return decode(body, kind, f"{self.url}/{key}", **expected)

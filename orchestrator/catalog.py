"""The run as it is stored: reading records, and the one loop that appends to the journal.

Opening and reading change nothing; a read-only credential is enough. Methods may be called from any thread.
"""

from __future__ import annotations

import random
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from orchestrator import garbage, journal, layout, survey
from orchestrator.errors import (
    Damaged,
    Fenced,
    JournalLost,
    NotARun,
    NothingToRestore,
    StepNotFound,
    StorageError,
    Suspect,
)
from orchestrator.events import Retried, emit
from orchestrator.journal import AttemptId, FencedBy, Found, Next, Refused, Stamp
from orchestrator.records import (
    AnyRecord,
    Extra,
    FileEntry,
    Head,
    Intent,
    LiveStep,
    Manifest,
    Receipt,
    crc32,
    crc32c,
    decode,
    encode,
    file_entry,
)
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
        self.storage: Storage = storage
        self.writer = writer
        self._clock = clock
        self._ids = ids or (lambda: uuid.uuid4().hex)
        self._known_version = -1  # where to start listing: versions only grow
        self._looked = False  # whether the run was looked at whole, which comes before any append
        self.durable_version = -1  # the highest that this object knows to survive a power loss: what records build on

    @property
    def url(self) -> str:
        return self.storage.url

    def stamp(self) -> Stamp:
        return Stamp(self.writer, self._clock(), self._ids())

    # Journal.

    def head(self) -> Head | None:
        """The highest journal entry; None in a new run: nothing says that there has ever been an entry. Raises
        JournalLost if something does, or if an entry that was read before is gone; Damaged if the highest entry cannot
        be trusted."""
        start = self._known_version if self._known_version >= 0 else self.marked_version()
        versions = self._versions(max(start, 0)) or (self._versions(0) if start > 0 else [])
        if not versions and self._known_version < 0:
            remains = self._remains()
            if not remains:
                return None
            versions = self._versions(0)  # again: somebody may have opened the run meanwhile
            if not versions:
                raise JournalLost(f"{self.url}: there is no journal, but {remains}; {self.recipe}")
        newest = max(versions, default=-1)
        if newest < self._known_version:
            if self.storage.get(layout.journal_key(self._known_version)) is None:
                text = f"entry {self._known_version} was there and is gone; the newest is {newest}"
                raise JournalLost(f"{self.url}: the journal has lost entries: {text}; {self.recipe}")
            newest = self._known_version  # a listing that is behind
        self._known_version = newest
        try:
            return self.entry(newest)
        except (Damaged, Suspect):
            pass  # read twice before it is said
        try:
            return self.entry(newest)
        except (Damaged, Suspect) as error:
            kind = type(error) if isinstance(error, Damaged) else Damaged
            raise kind(f"{error}; it is the journal's newest entry; {self.recipe}") from error

    @property
    def recipe(self) -> str:
        """What to do about a journal that cannot be trusted."""
        where = shlex.quote(self.url)
        return (
            f"nothing was changed; `orchestrator doctor {where}` and `orchestrator recover {where}` say what is whole"
        )

    def _remains(self) -> str:
        """What is there of a run that has no journal; '' if nothing is. Stops at the first."""
        for entry in self.storage.list(layout.STEPS):
            if found := layout.split_attempt_key(entry.key):
                return f"attempts are, such as {layout.shown(*found[:2])}"
        marked = self.marked_version()
        return f"{layout.JOURNAL_INDEX} names version {marked}" if marked >= 0 else ""

    def require_head(self) -> Head:
        """As `head`. Raises NotARun in a new run."""
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
        self.durable_version = max(self.durable_version, head.version)
        return head

    def entry(self, version: int) -> Head:
        """One journal entry. Raises Damaged if it is missing, edited or in the wrong place."""
        key = layout.journal_key(version)
        head = self._decode(self.storage.get(key), Head, key)
        if head.version != version:
            raise Damaged(f"{self.url}/{key}: says it is version {head.version}; it was copied or renamed, not used")
        for live in (*head.live, *head.aside):
            layout.parse_attempt(live.attempt)
        for gone in head.retired:
            layout.parse_attempt(gone.attempt)
        return head

    def entries(self) -> Iterator[Head]:
        """All journal entries, oldest first."""
        return (self.entry(version) for version in self.versions())

    def versions(self, start: int = 0) -> list[int]:
        """The versions from `start` on that have an object in the journal, ascending."""
        return sorted(self._versions(start))

    def _versions(self, start: int) -> list[int]:
        keys = (entry.key for entry in self.storage.list(layout.JOURNAL, layout.journal_key(start)))
        return [version for key in keys if (version := layout.journal_version(key)) is not None]

    def marked_version(self) -> int:
        """A version that the journal has reached, from its newest marker; -1 if it has none (yet)."""
        keys = (entry.key for entry in self.storage.list(layout.JOURNAL_INDEX))
        return next((version for key in keys if (version := layout.indexed_version(key)) is not None), -1)

    def _mark(self, version: int) -> None:
        """Spare later readers the listing of old entries. A hint: without it they list more, and find the same."""
        try:
            self.storage.create(layout.index_key(version), b"")
        except StorageError as error:
            logging.warning("%s: journal version %d could not be marked: %s", self.url, version, error)

    def append(self, rule: Callable[[Head | None, Stamp], Next]) -> Head | None:
        """Apply a journal rule: read the head, compute the next, create it; if somebody was first, do it again.

        Returns the head that holds the change (the current one where the rule found nothing to do). Raises Fenced if
        a newer epoch has been opened, what the rule refuses with, JournalLost if there was a journal and it is not
        (whole), and StorageError after 100 lost races.
        """
        if not self._looked:
            self.look()
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
                    if self.put(following):
                        return following
            wait_s = random.uniform(0, _CONFLICT_PAUSE_S)
            emit(Retried("journal", tries, wait_s=wait_s))
            time.sleep(wait_s)
        raise StorageError(f"{self.url}: lost {_CONFLICTS_MAX} races for the next journal version; too many writers")

    def look(self) -> tuple[Head | None, dict[AttemptId, Found]]:
        """The head and every attempt in storage (`survey.look`). Raises JournalLost."""
        found = survey.look(self)
        self._looked = True
        return found

    def probe(self) -> None:
        """Create an object among the attempts and delete it: whether this process may save here at all. The journal
        needs no probe, as opening an epoch is one create in it. Raises StorageError; nothing is left behind then."""
        key = f"{layout.STEPS}.probe-{uuid.uuid4().hex}"
        self.storage.create(key, b"")
        try:
            self.storage.delete(key)
        except StorageError as error:  # saving needs no right to delete, retention does
            logging.warning("%s/%s: cannot be deleted, nor will old steps be: %s", self.url, key, error)

    def put(self, following: Head) -> bool:
        """Create an entry if its version is not taken. It is durable then."""
        if following.version > layout.VERSION_MAX:
            key = layout.journal_key(layout.VERSION_MAX)
            raise Damaged(f"{self.url}/{key}: no version comes after it; no job has written it: move it out of the run")
        if not isinstance(self.storage.create(layout.journal_key(following.version), encode(following)), Created):
            return False
        self.durable_version = max(self.durable_version, following.version)
        self._known_version = max(self._known_version, following.version)
        if following.version % _MARKED_EVERY == 0:
            self._mark(following.version)
        return True

    # Attempts.

    def newest(self, head: Head) -> LiveStep | None:
        """The restorable step committed last; None in a new run, where no step was ever committed. Raises
        NothingToRestore where there are steps and all are quarantined: that must not be taken for a new run."""
        found = journal.newest(head)
        where = shlex.quote(self.url)
        if found is None and head.live:
            raise NothingToRestore(
                f"{self.url}: all {len(head.live)} steps are quarantined (newest: step {head.live[-1].step}); "
                f"`orchestrator log {where}` says why, `orchestrator verify --all {where}` and `orchestrator release "
                f"{where} --step=N` bring back what is good; to begin anew, use another root"
            )
        return found

    def find(self, step: int | None) -> LiveStep | None:
        """The `newest` step, or the given one. Raises NothingToRestore, StepNotFound."""
        head = self.head()
        if step is None:
            return self.newest(head) if head else None
        found = journal.find(head, step) if head else None
        if found is None or not found.restorable:
            have = ", ".join(str(live.step) for live in (head.live if head else ()) if live.restorable) or "none"
            why = self._quarantined(found) if found else "is not in this run"
            raise StepNotFound(f"{self.url}: step {step} {why}; restorable steps: {have}")
        return found

    def _quarantined(self, live: LiveStep) -> str:
        why = f" ({live.quarantine.reason})" if live.quarantine and live.quarantine.reason else ""
        command = f"orchestrator release {shlex.quote(self.url)} --step={live.step}"
        return f"is quarantined{why}; `{command}` makes it restorable again"

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
        manifest = self._decode(body, Manifest, key)
        for entry in manifest.files:
            layout.check_key(entry.path, f"{self.url}/{key}")
        return manifest

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
        """Who opened the attempt, and its tree spec."""
        key = self.key(live.step, live.attempt, layout.INTENT)
        return self._decode(self.file(live, manifest, layout.INTENT), Intent, key)

    def extra(self, live: LiveStep, manifest: Manifest) -> Extra:
        key = self.key(live.step, live.attempt, layout.EXTRA)
        return self._decode(self.file(live, manifest, layout.EXTRA), Extra, key)

    def receipt(self, step: int, attempt: str, process: int) -> tuple[Receipt, FileEntry] | None:
        """The receipt of a process, and it as a file of the attempt; None if it is not written yet."""
        key = self.key(step, attempt, layout.receipt_name(process))
        body = self.storage.get(key)
        if body is None:
            return None
        return self._decode(body, Receipt, key), file_entry(layout.receipt_name(process), body)

    def process_states(self, live: LiveStep, manifest: Manifest) -> dict[int, bytes]:
        files = [entry for entry in manifest.files if entry.path.startswith(layout.PROCESS)]
        return {layout.process_of(entry.path): self.checked(live, entry) for entry in files}

    def attempts(self) -> dict[AttemptId, int]:
        """(step, attempt) -> bytes of every attempt that has data in the store, committed or not."""
        return {key: one.bytes for key, one in self.stored().items()}

    def stored(self) -> dict[AttemptId, Found]:
        """Every attempt that has data in the store, committed or not, by one listing. `built_on` is not read."""
        found: dict[AttemptId, Found] = {}
        for entry in self.storage.list(layout.STEPS):
            if parts := layout.split_attempt_key(entry.key):
                before = found.get(parts[:2], Found())
                whole = before.whole or parts[2] == layout.MANIFEST
                found[parts[:2]] = Found(whole=whole, bytes=before.bytes + entry.bytes)
        return found

    def record(self, step: int, attempt: str, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
        """A record of any attempt, known to the journal or not; None if it is not there. Raises Damaged."""
        key = self.key(step, attempt, name)
        body = self.storage.get(key)
        return None if body is None else self._decode(body, kind, key)

    def _decode(self, body: bytes | None, kind: type[AnyRecord], key: str) -> AnyRecord:
        if body is None:
            raise Damaged(f"{self.url}/{key}: is missing")
        with garbage.paused():
            return decode(body, kind, f"{self.url}/{key}")

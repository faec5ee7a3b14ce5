"""The run as it is stored: reading records, and the one loop that appends to the journal.

Opening and reading change nothing; a read-only credential is enough. Methods may be called from any thread.
"""

from __future__ import annotations

import random
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from absl import logging

from orchestrator import gc_pause
from orchestrator.errors import (
    Damaged,
    Fenced,
    JournalLost,
    NotARun,
    NothingToRestore,
    StepNotFound,
    StepRetired,
    StorageError,
    Unavailable,
)
from orchestrator.observe.events import Retried, emit
from orchestrator.rules import journal, validate
from orchestrator.rules import keys as layout
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import RECORD_BYTES_MAX, AnyRecord, decode, encode
from orchestrator.rules.journal import FencedBy, Found, Next, Rejected, Stamp
from orchestrator.rules.records import Extra, FileEntry, Head, Intent, LiveStep, Manifest, Receipt, file_entry
from orchestrator.run import survey
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Created, Storage, TooLarge

READS = 3  # of one object, before what differs from read to read is given up
EARLY_S = 5.0  # a head that was read longer ago is read again before anything is built on it
_CONFLICTS_MAX = 100
_READ_THREADS = 4  # each holds one file in memory
_MEASURE_THREADS = 8
_CONFLICT_PAUSE_S = 0.01
_MARKED_EVERY = 500  # versions; half a page of a listing in an object store

Early = Begun[bytes | None] | None  # a reading of a record that was begun before somebody asked for it


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
        known = self._known_version
        likely = overlap.begin(partial(self.entry, known)) if known >= 0 else None  # mostly it is the newest still
        start = known if known >= 0 else self.marked_version()
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
        self._known_version = max(self._known_version, newest)
        try:
            return likely.result() if likely and newest == known else self.entry(newest)
        except Damaged as error:
            raise type(error)(f"{error}; it is the journal's newest entry; {self.recipe}") from error

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
            if found := AttemptId.in_key(entry.key):
                return f"attempts are, such as {found[0].label}"
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
        self.storage.make_durable([layout.journal_key(head.version)])
        self.durable_version = max(self.durable_version, head.version)
        return head

    def entry(self, version: int) -> Head:
        """One journal entry. Raises Damaged if it is missing, edited or in the wrong place."""
        key = layout.journal_key(version)
        for tries_left in reversed(range(READS)):
            body = self.storage.get(key)
            try:
                return self._decode(body, Head, key, version=version)
            except Damaged as error:  # once is no proof
                read = None if body is None else file_entry(key, body)
                there = self.storage.measure(key)  # what a cache has kept of it is gone then
                if (read and (read.bytes, read.crc32c)) == (there and (there.bytes, there.crc32c)):
                    raise
                if not tries_left:
                    text = f"{error}; but by the store's own account the entry is another: it could not be read"
                    raise Unavailable(text) from error
        raise AssertionError("unreachable")

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

    def append(
        self, rule: Callable[[Head | None, Stamp], Next], early: Begun[Head | None] | None = None
    ) -> Head | None:
        """Apply a journal rule: read the head, compute the next, create it; if somebody was first, do it again.

        `early`: a reading of the head that was begun a moment ago. The first try may build on it, as if this process
        had paused before it creates; what else the rule says is asked again of a head read now (decision 18).
        Returns the head that holds the change (the current one where the rule found nothing to do). Raises Fenced if
        a newer epoch has been opened, what the rule rejects with, JournalLost if there was a journal and it is not
        (whole), and StorageError after 100 lost races.
        """
        if not self._looked:
            self.look()
        for tries in range(1, _CONFLICTS_MAX + 1):
            following = self._built_on(rule, early) if tries == 1 else None
            head = None if following else self.head()
            match following or rule(head, self.stamp()):
                case None:
                    return head
                case FencedBy(epoch, writer):
                    raise Fenced(f"{self.url}: fenced by epoch {epoch}, opened by {writer}; this process must stop")
                case Rejected(error):
                    raise error
                case Head() as made:
                    if self.put(made):
                        return made
            wait_s = random.uniform(0, _CONFLICT_PAUSE_S)
            emit(Retried("journal", tries, wait_s=wait_s))
            time.sleep(wait_s)
        raise StorageError(f"{self.url}: lost {_CONFLICTS_MAX} races for the next journal version; too many writers")

    def _built_on(self, rule: Callable[[Head | None, Stamp], Next], early: Begun[Head | None] | None) -> Head | None:
        """The next head, made of an early reading; None if that is too old or has failed, or if `rule` makes none."""
        if early is None:
            return None
        try:
            head = early.result(EARLY_S)
        except Exception:  # read again, and then raised
            return None
        outcome = rule(head, self.stamp()) if early.age_s <= EARLY_S else None
        return outcome if isinstance(outcome, Head) else None

    def look(self) -> tuple[Head | None, dict[AttemptId, Found]]:
        """The head and every attempt in storage (`survey.look`). Raises JournalLost."""
        found = survey.look(self)
        self._looked = True
        return found

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
        return self.found(head, step)

    def found(self, head: Head | None, step: int) -> LiveStep:
        """This step of `head`. Raises StepNotFound."""
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

    def check_live(self, live: LiveStep) -> None:
        """The attempt is still live: whatever is wrong with what is stored of it is no matter of retention. Raises
        StepRetired."""
        head = self.require_head()
        if not journal.is_live(head, live.id):
            newest = journal.newest(head)
            now = f"the newest is step {newest.step}" if newest else "none is restorable"
            raise StepRetired(f"{self.url} {live.id.label}: was retired while it was read; {now}")

    def _proven(
        self,
        live: LiveStep,
        name: str,
        problem: Callable[[FileEntry | None], str],
        most_bytes: int = RECORD_BYTES_MAX,
        early: Early = None,
    ) -> bytes:
        """A file of an attempt that `problem` finds nothing wrong with, '' or in words. `early`: the first reading.

        What is wrong once is no proof. It is Damaged if the store's own account of the object is wrong as well, or if
        what it gave twice is what it has, and wrong. Else it is read again, and Unavailable in the end.
        """
        key = live.id.key(name)
        for _ in range(READS):
            expected_bytes = None
            try:
                body, early = early.result() if early else self.storage.get(key, most_bytes), None
                read = None if body is None else file_entry(name, body)
            except TooLarge as error:  # whatever is in it
                body, early, expected_bytes = None, None, most_bytes
                read = FileEntry(path=name, bytes=error.bytes, crc32c="")
            wrong = problem(read)
            if body is not None and not wrong:
                return body
            again = self.storage.measure(key, expected_bytes)
            self.check_live(live)  # last: whatever retention deletes it has journalled before
            if said := problem(again):
                raise Damaged(f"{self.url}/{key}: {said}", files=[name])
            if read and again and (read.bytes, read.crc32c) == (again.bytes, again.crc32c) and self._same(key, read):
                raise Damaged(f"{self.url}/{key}: {wrong}", files=[name])
        raise Unavailable(
            f"{self.url}/{key}: {wrong or 'was not there'} when read {READS} times, but the store's own account is "
            "right; the network, a cache or this host's memory gives wrong bytes"
        )

    def _same(self, key: str, read: FileEntry) -> bool:
        body = self.storage.get(key, max(read.bytes, RECORD_BYTES_MAX))
        return body is not None and file_entry(read.path, body) == read

    def manifest(self, live: LiveStep) -> Manifest:
        """The manifest of a committed attempt, checked against the journal. Raises Damaged, StepRetired."""
        key = live.id.key(layout.MANIFEST)

        def problem(found: FileEntry | None) -> str:
            if found is None:
                return "is missing"
            told = live.manifest_crc32c
            has = (
                f"crc32c is {found.crc32c}"
                if found.crc32c
                else f"has {found.bytes} bytes, more than a manifest can have"
            )
            return "" if found.crc32c == told else f"{has}, the journal says {told}"

        body = self._proven(live, layout.MANIFEST, problem)
        return self._decode(body, Manifest, key, step=live.step, attempt=live.attempt)

    def begin(self, live: LiveStep, name: str) -> Begun[bytes | None]:
        """Begin to read a record of an attempt, which is judged by whoever asks for it."""
        return overlap.begin(partial(self.storage.get, live.id.key(name)))

    def sizes(self, live: LiveStep) -> dict[str, int]:
        """Bytes of each file of an attempt by its name there, as a listing has them."""
        prefix = live.id.prefix
        return {entry.key.removeprefix(prefix): entry.bytes for entry in self.storage.list(prefix)}

    def check_sizes(self, live: LiveStep, manifest: Manifest, early: Begun[dict[str, int]] | None = None) -> None:
        """Every file of the manifest is there with its size. Raises Damaged naming the first that is not, StepRetired,
        Unavailable where a listing and the object itself tell different things. `early`: the first listing."""
        prefix = live.id.prefix
        for _ in range(READS):
            there, early = early.result() if early else self.sizes(live), None
            wrong = [wanted for wanted in manifest.files if there.get(wanted.path) != wanted.bytes]
            if not wrong:
                return
            self.check_measured(live, wrong[:1])
            self.check_live(live)
        raise Unavailable(
            f"{self.url}/{prefix}{wrong[0].path}: {READS} listings show {there.get(wrong[0].path, 'no')} bytes, "
            f"the store's own account is {wrong[0].bytes}, as the manifest says"
        )

    def check_measured(self, live: LiveStep, entries: Iterable[FileEntry]) -> None:
        """These files of the manifest are in the store, by its own account, as the manifest says. Raises Damaged naming
        the first that is not, StorageError. The attempt must be known to be live, before or after."""

        def problem(entry: FileEntry) -> str:
            key = live.id.key(entry.path)
            return _problem(entry, self.storage.measure(key, entry.bytes))

        wanted = list(entries)
        prefix = live.id.prefix
        with ThreadPoolExecutor(_MEASURE_THREADS, thread_name_prefix="measure") as pool:
            for entry, wrong in zip(wanted, pool.map(problem, wanted), strict=True):
                if wrong:
                    self.check_live(live)
                    raise Damaged(f"{self.url}/{prefix}{entry.path}: {wrong}", files=[entry.path])

    def check_files(self, live: LiveStep, manifest: Manifest, below: str, share: tuple[int, int]) -> None:
        """Read this process's share, (index, count), of the files below a name whole, a few at a time. Raises Damaged
        naming the first that is not what the manifest says."""
        index, count = share
        mine = [entry for entry in manifest.files if entry.path.startswith(below)][index::count]
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="verify") as pool:
            for _ in pool.map(lambda entry: len(self.checked(live, entry)), mine):
                pass

    def file(self, live: LiveStep, manifest: Manifest, name: str, early: Early = None) -> bytes | None:
        """A small file of an attempt, checked against the manifest; None if the attempt has none of that name."""
        entry = next((entry for entry in manifest.files if entry.path == name), None)
        return None if entry is None else self.checked(live, entry, early)

    def checked(self, live: LiveStep, entry: FileEntry, early: Early = None) -> bytes:
        """A file of an attempt, as the manifest's `entry` says it is. Raises Damaged, StepRetired, StorageError."""
        most_bytes = max(entry.bytes, RECORD_BYTES_MAX)  # a process's state may be of any size
        return self._proven(live, entry.path, partial(_problem, entry), most_bytes, early)

    def measured(self, live: LiveStep, entry: FileEntry) -> None:
        """As `checked`, by the store's own account: an object store knows its objects' checksums without a download."""
        self.check_measured(live, [entry])

    def intent(self, live: LiveStep, manifest: Manifest, early: Early = None) -> Intent:
        """Who opened the attempt, and its tree spec, whose arrays fit what the manifest lists. Raises Damaged."""
        key = live.id.key(layout.INTENT)
        body = self.file(live, manifest, layout.INTENT, early)
        intent = self._decode(body, Intent, key, step=live.step, attempt=live.attempt)
        try:
            validate.fits(intent, manifest)
        except validate.Invalid as error:
            raise Damaged(f"{self.url}/{key}: {error}; not used") from error
        return intent

    def extra(self, live: LiveStep, manifest: Manifest, early: Early = None) -> Extra:
        key = live.id.key(layout.EXTRA)
        return self._decode(self.file(live, manifest, layout.EXTRA, early), Extra, key, step=live.step)

    def receipt(
        self, attempt: AttemptId, process: int, created: bytes | None = None
    ) -> tuple[Receipt, FileEntry] | None:
        """The receipt of a process, and it as a file of the attempt; None if it is not written yet. `created`: what the
        store has just acknowledged under its name; it is not read again then."""
        key = attempt.receipt_key(process)
        body = self.storage.get(key) if created is None else created
        if body is None:
            return None
        receipt = self._decode(body, Receipt, key, step=attempt.step, attempt=attempt.name, process=process)
        return receipt, file_entry(layout.receipt_name(process), body)

    def stored_receipts(self, live: LiveStep, manifest: Manifest) -> list[Receipt]:
        """The receipts of a committed attempt, checked against the manifest, as far as it lists any (an adopted one has
        none)."""
        listed = [entry for entry in manifest.files if entry.path.startswith(layout.RECEIPTS)]
        prefix = live.id.prefix
        where = {"step": live.step, "attempt": live.attempt}
        return [
            self._decode(
                self.checked(live, entry),
                Receipt,
                prefix + entry.path,
                process=layout.process_of(entry.path),
                **where,
            )
            for entry in listed
        ]

    def process_states(self, live: LiveStep, manifest: Manifest) -> dict[int, bytes]:
        files = [entry for entry in manifest.files if entry.path.startswith(layout.PROCESS)]
        if not files:
            return {}
        with ThreadPoolExecutor(min(_READ_THREADS, len(files)), thread_name_prefix="process-states") as pool:
            bodies = pool.map(partial(self.checked, live), files)
            return {layout.process_of(entry.path): body for entry, body in zip(files, bodies, strict=True)}

    def attempts(self) -> dict[AttemptId, int]:
        """Bytes of every attempt that has data in the store, committed or not."""
        return {key: one.bytes for key, one in self.stored().items()}

    def stored(self) -> dict[AttemptId, Found]:
        """Every attempt that has data in the store, committed or not, by one listing. `built_on` is not read."""
        found: dict[AttemptId, Found] = {}
        for entry in self.storage.list(layout.STEPS):
            if parts := AttemptId.in_key(entry.key):
                before = found.get(parts[0], Found())
                whole = before.whole or parts[1] == layout.MANIFEST
                found[parts[0]] = Found(whole=whole, bytes=before.bytes + entry.bytes)
        return found

    def record(self, attempt: AttemptId, name: str, kind: type[AnyRecord]) -> AnyRecord | None:
        """A record of any attempt, known to the journal or not; None if it is not there. Raises Damaged."""
        key = attempt.key(name)
        body = self.storage.get(key)
        return None if body is None else self._decode(body, kind, key)

    def _decode(self, body: bytes | None, kind: type[AnyRecord], key: str, **expected: object) -> AnyRecord:
        if body is None:
            raise Damaged(f"{self.url}/{key}: is missing")
        with gc_pause.paused():
            return decode(body, kind, f"{self.url}/{key}", **expected)


def _problem(wanted: FileEntry, found: FileEntry | None) -> str:
    """What is wrong with a file, '' if it is as the manifest says."""
    if found is None:
        return f"is missing, the manifest says {wanted.bytes} bytes"
    if (found.bytes, found.crc32c) != (wanted.bytes, wanted.crc32c):
        has = f"{found.bytes} bytes" + (f" with crc32c {found.crc32c}" if found.crc32c else "")
        return f"has {has}, the manifest says {wanted.bytes} bytes with crc32c {wanted.crc32c}"
    if found.crc32 and wanted.crc32 and found.crc32 != wanted.crc32:
        return f"is whole, but another file: crc32 {found.crc32}, the manifest says {wanted.crc32}"
    return ""

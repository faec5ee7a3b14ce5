"""This process's own part of a tier, which it writes, and what else lies on its host.

A tier is a store, and whose it is. What one holds has the layout of a run: attempts, and a log in the form of a
journal, of which only the newest entries are kept. It is a cache: what cannot be trusted in it is thrown away. Beside
it are directories of the same form, without a log: the copies that this host takes, and what processes of earlier
starts have left.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from absl import logging

from orchestrator.errors import Damaged, Fenced, JournalLost, OrchestratorError
from orchestrator.rules import held, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry, Head, LiveStep
from orchestrator.run import prefetched, survey, tier_directory
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.storage.port import Created, Entry, Exists, Reads, Storage
from orchestrator.storage.read_only import ReadOnlyStorage

_LOG_KEPT = 16  # entries: a reader needs the newest, and those just before it for what is being read


class LogOf:
    """A tier without its attempts: where others' copies lie beside, they prove nothing about a log."""

    def __init__(self, tier: Storage) -> None:
        self._tier, self.url = tier, tier.url

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._tier.get(key, most_bytes)

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        return iter(()) if prefix.startswith(keys.STEPS) else self._tier.list(prefix, start)

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._tier.measure(key, expected_bytes)

    def create(self, key: str, body: bytes) -> Created | Exists:
        return self._tier.create(key, body)

    def delete(self, key: str) -> bool:
        return self._tier.delete(key)

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        return self._tier.make_durable(keys, known)


def log_to_read(tier: Reads) -> JournalStore:
    """The log of any tier, of another host's too."""
    return JournalStore(LogOf(ReadOnlyStorage(tier)), "reader")


def _delete_below(storage: PosixStorage, prefix: str) -> None:
    """The manifest first: without it nothing is readable."""
    found = [entry.key for entry in storage.list(prefix)]
    for key in sorted(found, key=lambda key: (not key.endswith(keys.MANIFEST), key)):
        storage.delete(key)


def _free(storage: PosixStorage, attempts: Iterable[AttemptId]) -> list[AttemptId]:
    """Delete their files. Returns those of which nothing is left. Never raises."""
    gone = []
    for attempt in attempts:
        try:
            _delete_below(storage, attempt.prefix)
            gone.append(attempt)
        except OrchestratorError as error:
            logging.warning("%s %s: stays for now: %s", storage.url, attempt.label, error)
    return gone


class OwnTier:
    """The part of the tier that this process writes, below `path`. Any thread. run: of whose steps it is, where what is
    held goes to that store, too. pinned: attempts that are on their way there: what this process has of them stays."""

    def __init__(self, path: str, writer: str, run: JournalStore | None = None) -> None:
        self.path, self._run = path, run
        self.storage = PosixStorage(path)
        self.log = JournalStore(LogOf(self.storage), writer, run=run)
        self.pinned: set[AttemptId] = set()
        self._epoch = 0

    def open_epoch(self, epoch: int, version: int) -> Head:
        """Begin to hold for incarnation `epoch`, which the run's journal has opened in `version`. Returns the newest
        entry of the log. Raises Fenced if a newer one holds here already, NewerFormat, StorageError."""
        self._epoch = epoch
        tier_directory.make(self.path)
        rule = partial(held.open_epoch, epoch=epoch, version=version)
        try:
            self._cut_damaged_end()
            head = self.log.append(rule)
        except Fenced as error:
            text = "a newer start of this job holds here, or the run's journal has lost entries or was set back"
            remedy = f"if somebody has set it back to a backup, remove {os.path.dirname(self.path)} on all hosts"
            raise Fenced(f"{self.path}: {text}: {error}; {remedy}") from error
        except (Damaged, JournalLost) as error:  # a cache: begin again; but what a newer version holds is whole
            logging.warning("%s: its log cannot be trusted, and is thrown away: %s", self.path, error)
            _delete_below(self.storage, keys.JOURNAL)
            _delete_below(self.storage, keys.JOURNAL_INDEX)
            self.log = JournalStore(LogOf(self.storage), self.log.writer, run=self._run)
            head = self.log.append(rule)
        assert head is not None  # the rule makes one where there is none
        return head

    def _cut_damaged_end(self) -> None:
        """Where the log's newest entries are damaged, it goes on from the one before: what that says is held, and is
        not any more, a restore finds missing. Raises Damaged if none is whole."""
        if (whole := newest_whole(self.log)) is None:
            return
        damaged = [version for version in self.log.versions() if version > whole.version]
        for version in damaged:
            logging.warning("%s: entry %d of its log is damaged, and is left out", self.path, version)
            self.storage.delete(keys.journal_key(version))
        if damaged:
            self.log = JournalStore(LogOf(self.storage), self.log.writer, run=self._run)

    def follow(self, log: JournalStore) -> Head:
        """Enter what process 0's log says is held into this process's; returns its newest entry. Raises StorageError,
        Fenced."""
        head = log.require_head()
        here = self.attempts().keys()
        self.log.append(partial(held.follow, epoch=self._epoch, live=[one for one in head.live if one.id in here]))
        return head

    def live(self) -> tuple[LiveStep, ...]:
        """What its log says is held, oldest first. Raises StorageError, Damaged."""
        head = self.log.head()
        return tuple(sorted(head.live, key=lambda one: held.rank(one.id))) if head else ()

    def attempts(self) -> dict[AttemptId, int]:
        """Those of which there are files here, and their bytes. Raises StorageError."""
        return {attempt: one.bytes for attempt, one in survey.attempts(self.storage).items()}

    def free(self, attempts: Sequence[AttemptId]) -> None:
        """Free what is here of attempts that are not held, unless they are pinned. Never raises."""
        gone = _free(self.storage, [attempt for attempt in attempts if attempt not in self.pinned])
        try:
            head = self.log.head()
            over = {old.id for old in head.retired}.difference(self.attempts()) if head else set()
            if gone or over:
                self.log.append(partial(journal.collected, attempts=[*gone, *over]))
        except OrchestratorError as error:  # it lists for a while what is gone
            logging.warning("%s: %s", self.path, error)

    def forget_older_entries(self) -> None:
        """Keep the log small: it is in memory. Never raises."""
        with contextlib.suppress(OrchestratorError):
            entries = sorted(entry.key for entry in self.storage.list(keys.JOURNAL))
            marks = [entry.key for entry in self.storage.list(keys.JOURNAL_INDEX)]
            for key in [*entries[:-_LOG_KEPT], *marks]:
                self.storage.delete(key)

    def release(self, attempts: Collection[AttemptId], reason: str) -> None:
        """Hold these steps no more, and free their memory. Raises Fenced, StorageError."""
        self.log.append(partial(held.release, epoch=self._epoch, attempts=set(attempts), reason=reason))
        self.free([attempt for attempt in self.attempts() if attempt in attempts])


class Beside:
    """The parts on this host that none of its processes writes: copies for other hosts, and what processes of earlier
    starts have left; not what was fetched for a restore. own: the path of a process of this host. processes: all of
    them. Any thread."""

    def __init__(self, own: str, processes: Collection[int]) -> None:
        self._own, self._processes = own, frozenset(processes)

    def _parts(self) -> Iterator[PosixStorage]:
        for path in tier_directory.beside(self._own):
            if tier_directory.process_of(path) not in {*self._processes, prefetched.PROCESS}:
                tier_directory.check_path(path)
                yield PosixStorage(path)

    def attempts(self) -> dict[AttemptId, int]:
        """As `OwnTier.attempts`. Raises StorageError."""
        found: dict[AttemptId, int] = {}
        for storage in self._parts():
            for attempt, one in survey.attempts(storage).items():
                found[attempt] = found.get(attempt, 0) + one.bytes
        return found

    def free(self, attempts: Sequence[AttemptId]) -> None:
        """Never raises."""
        try:
            for storage in self._parts():
                _free(storage, attempts)
        except OrchestratorError as error:
            logging.warning("beside %s: what is not held any more stays for now: %s", self._own, error)


def newest_whole(log: JournalStore) -> Head | None:
    """The newest entry of a tier's log that is not damaged; None if it has none. Raises Damaged, StorageError."""
    try:
        return log.head()
    except Damaged as error:
        for version in reversed(log.versions()):
            with contextlib.suppress(Damaged):
                return log.entry(version)
        raise error

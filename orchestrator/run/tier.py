"""This process's own part of a tier, which it writes.

A tier is a store, and whose it is. What one holds has the layout of a run: attempts, and a log in the form of a
journal, of which only the newest entries are kept. It is a cache: what cannot be trusted in it is thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from functools import partial

from absl import logging

from orchestrator.errors import Damaged, Fenced, JournalLost, OrchestratorError, StorageError
from orchestrator.observe.events import Event
from orchestrator.rules import held, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head
from orchestrator.run import deletion, survey, tier_directory
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage

_LOG_KEPT = 16  # entries: a reader needs the newest, and those just before it for what is being read


def untold(event: Event) -> None:
    """What is deleted in a tier is no step of the run: whoever counts those does not hear of it."""


def _delete_below(storage: PosixStorage, prefix: str) -> None:
    for entry in storage.list(prefix):
        storage.delete(entry.key)


class OwnTier:
    """The part of the tier that this process writes, below `path`. Any thread. run: of whose steps it is, where what is
    held goes to that store, too. pinned: attempts that are on their way there: what this process has of them stays."""

    def __init__(self, path: str, writer: str, run: JournalStore | None = None) -> None:
        self.path, self._run = path, run
        self.storage = PosixStorage(path)
        self.log = JournalStore(self.storage, writer, run=run)
        self.pinned: set[AttemptId] = set()
        self._epoch = 0

    def open_epoch(self, epoch: int, version: int) -> tuple[int, str]:
        """Begin to hold for incarnation `epoch`, which the run's journal has opened in `version`. Returns version and
        write_id of the newest entry of the log. Raises Fenced if a newer one holds here already, NewerFormat,
        StorageError."""
        self._epoch = epoch
        tier_directory.make(self.path)
        rule = partial(held.open_epoch, epoch=epoch, version=version)
        try:
            self._cut_damaged_end()
            head = self.log.append(rule)
        except Fenced as error:
            text = "a newer start of this job holds here, or the run's journal has lost entries"
            raise Fenced(f"{self.path}: {text}: {error}") from error
        except (Damaged, JournalLost) as error:  # a cache: begin again; but what a newer version holds is whole
            logging.warning("%s: what is held here cannot be trusted, and is thrown away: %s", self.path, error)
            _delete_below(self.storage, "")
            self.log = JournalStore(self.storage, self.log.writer, run=self._run)
            head = self.log.append(rule)
        assert head is not None  # the rule makes one where there is none
        return head.version, head.write_id

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
            self.log = JournalStore(self.storage, self.log.writer, run=self._run)

    def follow(self, log: JournalStore) -> None:
        """Enter what process 0's log says is held into this process's. Raises StorageError, Fenced."""
        head = log.require_head()
        here = survey.attempts(self.storage).keys()
        self.log.append(partial(held.follow, epoch=self._epoch, live=[one for one in head.live if one.id in here]))

    def delete(self, attempt: AttemptId) -> None:
        """Free what this process has written of an attempt that it does not hold, unless that is pinned. Never
        raises."""
        try:
            if attempt not in self.pinned:
                _delete_below(self.storage, attempt.prefix)
        except OrchestratorError as error:
            logging.warning("%s %s: stays in memory for now: %s", self.path, attempt.label, error)

    def unpin(self, attempt: AttemptId) -> None:
        """It is needed for the store no more: free it, if it is not held either. Never raises."""
        self.pinned.discard(attempt)
        try:
            head = self.log.head()
        except OrchestratorError as error:
            logging.warning("%s %s: stays in memory for now: %s", self.path, attempt.label, error)
            return
        if head is None or not journal.is_live(head, attempt):
            self.delete(attempt)

    def forget_older_entries(self) -> None:
        """Keep the log small: it is in memory. Never raises."""
        with contextlib.suppress(OrchestratorError):
            entries = sorted(entry.key for entry in self.storage.list(keys.JOURNAL))
            marks = [entry.key for entry in self.storage.list(keys.JOURNAL_INDEX)]
            for key in [*entries[:-_LOG_KEPT], *marks]:
                self.storage.delete(key)

    def make_room(self, need: int, bytes_max: int | None) -> None:
        """Before `need` bytes are written: release older steps, as far as it takes. Raises StorageError saying what is
        needed and what there is; then nothing was released. Raises Fenced."""
        sizes = {attempt: one.bytes for attempt, one in survey.attempts(self.storage).items()}
        head = self.log.head()
        older = [live for live in head.live if live.id not in self.pinned] if head else []
        used, free = sum(sizes.values()), tier_directory.free_bytes(self.path)
        room = free if bytes_max is None else min(free, bytes_max - used)
        count = held.to_release([sizes.get(live.id, 0) for live in older], need, room)
        if count is None:
            limit = "" if bytes_max is None else f" of the {bytes_max} of bytes_max"
            others = tier_directory.other_runs(self.path)
            more = f"; other runs hold steps in {', '.join(others[:3])}: remove those that are over" if others else ""
            raise StorageError(
                f"{self.path}: no room in memory: this process needs {need} bytes for a held step, and there are "
                f"{max(0, room)}{limit} beside the {used} that it holds (the newest step stays); free on the file "
                f"system and in memory: {free} bytes{more}. Give the tier more room (docker: --shm-size; Kubernetes: "
                "an emptyDir in memory), or hold it on a local disk: oc.memory(directory=...)"
            )
        if count:
            self.release([live.id for live in older[:count]], "room")

    def release(self, attempts: Sequence[AttemptId], reason: str) -> None:
        """Hold these steps no more, and free their memory. Raises Fenced, StorageError."""
        self.log.append(partial(held.release, epoch=self._epoch, attempts=set(attempts), reason=reason))
        for line in deletion.collect(
            self.log, epoch=self._epoch, orphans=False, spared=self.pinned, tell=untold
        ).failed:
            logging.warning("%s: %s", self.path, line)


def newest_whole(log: JournalStore) -> Head | None:
    """The newest entry of a tier's log that is not damaged; None if it has none. Raises Damaged, StorageError."""
    try:
        return log.head()
    except Damaged as error:
        for version in reversed(log.versions()):
            with contextlib.suppress(Damaged):
                return log.entry(version)
        raise error


def free_left_over(own: str, count: int, live: Collection[AttemptId]) -> None:
    """Of processes that the job has no more of, on this machine: free what is not among the `live`. Never raises."""
    try:
        for path in [path for path in tier_directory.beside(own) if tier_directory.process_of(path) >= count]:
            tier_directory.check_path(path)
            storage = PosixStorage(path)
            for attempt in survey.attempts(storage).keys() - live:
                _delete_below(storage, attempt.prefix)
    except OrchestratorError as error:
        logging.warning("beside %s: what an earlier start has left there stays for now: %s", own, error)

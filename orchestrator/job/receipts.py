"""Collecting the receipts of one attempt, on process 0: as soon as a process has voted, and, as a signal may be lost,
once a second from a listing of storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from orchestrator.errors import Damaged, StorageError
from orchestrator.job.poll import poll
from orchestrator.job.signals import Signals, Votes, unusable_receipt
from orchestrator.rules.attempt import Attempt, DeadlinePassed, ReceiptsRead, Step, advance
from orchestrator.rules.attempt_id import receipt_process
from orchestrator.rules.records import FileEntry, Receipt
from orchestrator.run import checked_reads
from orchestrator.run.journal_store import JournalStore

RECEIPT_READS = 64  # at once
RECEIPT_BATCH = 16 * RECEIPT_READS


class ReceiptReader:
    """Of the attempt that `state` is about. `hosts` names the processes. own: process 0's receipt, as the store has
    acknowledged it; it need not be read then. `files` are the stored receipts read so far, by their path in it."""

    def __init__(
        self, store: JournalStore, signals: Signals, hosts: Mapping[int, str], state: Attempt, own: bytes | None
    ) -> None:
        self._store, self._signals, self._hosts, self._own = store, signals, hosts, own
        self._state = state
        self._attempt = state.intent.id
        self.files: dict[str, FileEntry] = {}

    def collect(self, timeout_s: float) -> Step:
        """Until all receipts are in, a process votes to abort, or `timeout_s` has passed: the state, and what to do
        now."""

        def late() -> Step:
            return advance(self._state, DeadlinePassed(timeout_s, self._hosts))

        signalled = lambda: self._take(self._signals.votes(self._attempt))  # noqa: E731
        return poll(signalled, timeout_s, late, storage=lambda: self._take(self._listed()))

    def _take(self, votes: Votes) -> Step | None:
        """Go by votes that have not been counted yet; None while others are missing."""
        ready = [(process, votes[process]) for process in self._state.missing if process in votes]
        for receipts in self._read(ready):
            self._state, effect = advance(self._state, ReceiptsRead(receipts))
            if effect is not None:
                return self._state, effect
        return None

    def _listed(self) -> Votes:
        """The votes of the processes whose receipts are in storage. One listing, however many there are."""
        prefix = self._attempt.receipts_prefix
        try:
            names = [entry.key for entry in self._store.storage.list(prefix)]
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s cannot be listed yet: %s", prefix, error)
            return {}
        return {process: None for name in names if (process := receipt_process(name)) is not None}

    def _read(self, ready: list[tuple[int, Receipt | None]]) -> Iterator[tuple[Receipt, ...]]:
        """What can be read, in batches, many at once: an object store takes as long for each as for all."""
        if not ready:
            return
        with ThreadPoolExecutor(min(RECEIPT_READS, len(ready)), thread_name_prefix="receipts") as pool:
            for first in range(0, len(ready), RECEIPT_BATCH):
                batch = ready[first : first + RECEIPT_BATCH]
                read = pool.map(lambda each: each[1] or self._stored(each[0]), batch)
                yield tuple(receipt for receipt in read if receipt)

    def _stored(self, process: int) -> Receipt | None:
        """A receipt from storage, None if it is not there (yet). One that is damaged counts as an abort vote."""
        try:
            found = checked_reads.receipt(
                self._store.storage, self._attempt, process, self._own if process == 0 else None
            )
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("receipt of process %d cannot be read yet: %s", process, error)
            return None
        except Damaged as error:
            return unusable_receipt(self._attempt, process, self._hosts, str(error))
        if found is None:
            return None
        receipt, entry = found
        self.files[entry.path] = entry
        return receipt

"""Collecting the receipts of one attempt, on process 0: as soon as a process has voted, and, as a signal may be lost,
once a second from a listing of storage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from orchestrator.errors import Damaged, StorageError
from orchestrator.job.poll import poll
from orchestrator.job.signals import Signals, unusable_receipt
from orchestrator.job.uploading import AGAIN_S
from orchestrator.rules import keys
from orchestrator.rules.attempt import Attempt, DeadlinePassed, ReceiptsRead, Step, advance
from orchestrator.rules.attempt_id import receipt_file
from orchestrator.rules.records import FileEntry, Receipt
from orchestrator.run import checked_reads
from orchestrator.run.journal_store import JournalStore

RECEIPT_READS = 64  # at once
RECEIPT_BATCH = 16 * RECEIPT_READS
Ready = tuple[int, str | Receipt]  # a process, and its abort vote or the name of a file that it has stored


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

    def collect(
        self,
        timeout_s: float,
        given_up: Callable[[], bool] = lambda: False,
        longer: Callable[[], bool] = lambda: False,
    ) -> Step:
        """Until all receipts are in, a process votes to abort, or `timeout_s` has passed, or `given_up` says as much:
        the state, and what to do now. longer: asked at the deadline and after it, whether to wait on."""
        began, again = time.monotonic(), False

        def over() -> Step:
            real_s = round(time.monotonic() - began, 1)
            waited_s = real_s if again else min(timeout_s, real_s) if given_up() else timeout_s
            return advance(self._state, DeadlinePassed(waited_s, self._hosts))

        def late() -> Step | None:
            return None if not given_up() and longer() else over()

        def signalled() -> Step | None:
            return self._signalled() or (over() if given_up() else None)

        left_s = timeout_s
        while (step := poll(signalled, left_s, late, storage=self._listed)) is None:
            left_s, again = AGAIN_S, True
        return step

    def _signalled(self) -> Step | None:
        """Go by votes that have not been counted yet; None while others are missing."""
        ready: list[Ready] = []
        for process, vote in self._signals.votes(self._attempt).items():
            if isinstance(vote, int):
                ready += [(process, keys.group_receipt_name(process, number + 1)) for number in range(vote)]
            else:
                ready.append((process, vote or keys.receipt_name(process)))
        return self._take(ready)

    def _listed(self) -> Step | None:
        """Go by the receipts that are in storage. One listing, however many there are."""
        prefix = self._attempt.receipts_prefix
        try:
            found = [receipt_file(entry.key) for entry in self._store.storage.list(prefix)]
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s cannot be listed yet: %s", prefix, error)
            return None
        return self._take([one for one in found if one])

    def _take(self, ready: Sequence[Ready]) -> Step | None:
        count = self._state.intent.process_count
        new = [one for one in ready if 0 <= one[0] < count and not self._is_in(*one)]
        for receipts in self._read(new):
            self._state, effect = advance(self._state, ReceiptsRead(receipts))
            if effect is not None:
                return self._state, effect
        return None

    def _is_in(self, process: int, vote: str | Receipt) -> bool:
        if isinstance(vote, str) and keys.group_of(vote):
            return vote in self.files
        return process in self._state.receipts

    def _read(self, ready: Sequence[Ready]) -> Iterator[tuple[Receipt, ...]]:
        """What can be read, in batches, many at once: an object store takes as long for each as for all."""
        if not ready:
            return
        with ThreadPoolExecutor(min(RECEIPT_READS, len(ready)), thread_name_prefix="receipts") as pool:
            for first in range(0, len(ready), RECEIPT_BATCH):
                batch = ready[first : first + RECEIPT_BATCH]
                read = pool.map(lambda one: self._stored(*one), batch)
                yield tuple(receipt for found in read for receipt in found)

    def _stored(self, process: int, vote: str | Receipt) -> tuple[Receipt, ...]:
        """An abort vote, or the receipts in a file, () if it is not there (yet). One that is damaged counts as an abort
        vote of the process that stored it."""
        if isinstance(vote, Receipt):
            return (vote,)
        try:
            created = self._own if vote == keys.receipt_name(0) else None
            found = checked_reads.receipts(self._store.storage, self._attempt, vote, created)
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s of process %d cannot be read yet: %s", vote, process, error)
            return ()
        except Damaged as error:
            return (unusable_receipt(self._attempt, process, self._hosts, str(error)),)
        if found is None:
            return ()
        receipts, entry = found
        self.files[entry.path] = entry
        return receipts

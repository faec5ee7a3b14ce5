"""One process's vote in one save: it writes its part, makes it durable and votes that its receipt is stored, or votes
to abort with the cause. On the save's own thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from absl import logging

from orchestrator import arrays, failpoints
from orchestrator.arrays import ArrayWriter
from orchestrator.errors import WaitTimeout
from orchestrator.job.contribution import Contribution
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.group_receipts import ReceiptSigning, Work
from orchestrator.job.leaf_accounts import LeafAccounts
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.signals import Signals
from orchestrator.job.step_order import StepOrder
from orchestrator.observe.events import Event, SavePhase, emit
from orchestrator.options import Options
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import FileEntry, Receipt
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Storage

PROGRESS_S = 2.0  # from one event about a save that is writing to the next
GRACE_S = 5.0  # how much longer than the coordinator's deadline the others wait for its decision


@dataclass(frozen=True)
class SaveContext:
    """What all saves of this process share. coordinator: on process 0 only. committed: called after each
    commit, on the save's own thread. tell: is given the events of these saves. admit: is told, on the main thread, how
    many bytes of an attempt this process is going to write, before anything is taken; what it raises is its abort
    vote."""

    store: JournalStore
    writer: ArrayWriter
    rendezvous: Rendezvous
    signals: Signals
    coordinator: Coordinator | None
    options: Options
    committed: Callable[[], None]
    accounts: LeafAccounts
    order: StepOrder
    epoch: int
    signing: ReceiptSigning
    tell: Callable[[Event], None] = emit
    admit: Callable[[AttemptId, int], None] = lambda attempt, need: None


class Voter:
    """part: what this process contributes; `part_whole` once `part_over`: it is durable, with its receipt. abandoned:
    where given, others' votes to abort do not keep this process from writing until that says so: its part is needed
    elsewhere, too. here: where that can be taken from: what the store has of it without copies. started_s: on the
    monotonic clock."""

    def __init__(self, context: SaveContext, attempt: AttemptId, process_state: bytes | None) -> None:
        self.id, self.step = attempt, attempt.step
        self.started_s = time.monotonic()
        self.part_whole, self.part_over = False, threading.Event()
        self.abandoned: Callable[[], bool] | None = None
        self.here: Storage | None = None
        self._shared = context
        self._own = Contribution(context.store, context.rendezvous, attempt, process_state)
        self._phase = "stage"  # what fails next fails in it
        self._problem: BaseException | None = None
        self._to_sign: Work = lambda: None
        self._reported_s = 0.0  # when progress was last reported, on the monotonic clock

    @property
    def label(self) -> str:
        return self.id.label

    @property
    def timeout_s(self) -> float:
        """From when it began to its decision."""
        return self._shared.options.save_timeout_s

    @property
    def part(self) -> Contribution:
        return self._own

    @property
    def problem(self) -> BaseException | None:
        """Why this process votes to abort."""
        return self._problem

    @property
    def _left_s(self) -> float:
        return max(0.0, self.started_s + self.timeout_s - time.monotonic())

    def _vote(self, opening: Begun[tuple[FileEntry, ...]] | None) -> bytes | None:
        """Make this process's part durable and vote that its receipt is stored, or vote to abort with the cause.
        `opening`: what must have been written before. Returns the receipt; process 0's own is stored then."""
        try:
            if self._problem:
                raise self._problem
            self._phase = "write"
            self._report("writing")
            failpoints.hit("save.write")
            self._own.write(self.timeout_s, self._another_aborts)
            self._phase = "seal"
            self._report("sealing")
            self._own.make_durable()
            if opening:
                self._phase = "open"
                self._await_opening(opening)
            self._phase = "receipt"
            failpoints.hit("receipt.write")
            self._to_sign = self._shared.signing.sign(self.id, self._own)
            self._report("waiting")
            self.part_whole = True
            return self._own.signed
        except arrays.WriteStopped:  # another's abort vote has decided: none of ours, so that theirs is the cause
            logging.warning("%s: gave up writing, another process has voted to abort", self.label)
        except Exception as error:
            self._problem = error
            self._vote_abort(self._own.abort_vote(self._phase, error))
            self._keep_part()
        finally:
            self._own.wait_for_own_state(GRACE_S)
            self.part_over.set()
        return None

    def _keep_part(self) -> None:
        """It has failed here: a copy, perhaps. The part itself may be whole, for whoever else needs it."""
        if self.here is None or not self._own.written:
            return
        try:
            self._own.make_durable(self.here)
            self.part_whole = bool(self._own.signed)
        except Exception as error:
            logging.warning("%s: nor is it whole in memory: %s", self.label, error)

    def _finish_signing(self) -> None:
        try:
            self._to_sign()
        except Exception as error:
            self._to_sign = lambda: None
            self._vote_abort(self._own.abort_vote("receipt", error))

    def _vote_abort(self, vote: Receipt) -> None:
        self._shared.signals.vote_abort(vote)
        try:
            self._own.store_abort_vote(vote)
        except Exception as error:  # the signal carries it already; a full disk cannot hold the receipt
            text = "%s: the abort vote of process %d could not be stored: %s"
            logging.warning(text, self.label, vote.process, error)

    def _await_opening(self, opening: Begun[tuple[FileEntry, ...]]) -> None:
        try:
            opening.result(self._left_s)
        except TimeoutError as error:
            where = f"{self._shared.store.url}/{self.id.intent_key}"
            raise WaitTimeout(f"{where} was not written within {self.timeout_s:g} s") from error

    def _another_aborts(self) -> bool:
        """Asked again and again while this process writes, so it reports the progress, too."""
        if time.monotonic() - self._reported_s >= PROGRESS_S:
            self._report("writing")
        if self.abandoned and not self.abandoned():
            return False
        return any(isinstance(vote, Receipt) for vote in self._shared.signals.votes(self.id).values())

    def _report(self, phase: str) -> None:
        self._reported_s = time.monotonic()
        elapsed_s = self._reported_s - self.started_s
        self._shared.tell(SavePhase(self.step, self.id.name, phase, elapsed_s, self._own.written_bytes))

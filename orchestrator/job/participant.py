"""One save on one process: stage on the main thread, then write, vote and learn the outcome on a thread of its own.

On process 0 that thread also runs the coordinator. It never runs a collective. Every wait in it is bounded by
`Options.save_timeout_s` (plus a few seconds' grace, so that the coordinator's own decision comes first).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import assert_never

import jax
from absl import logging

from orchestrator import errors, failpoints
from orchestrator.arrays import ArrayWriter, Flat
from orchestrator.errors import JournalLost, OrchestratorError, SaveFailed
from orchestrator.job.attempt_names import AttemptNames
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.decision import DecisionReader
from orchestrator.job.finalize import OwnPart, UserData
from orchestrator.job.group_receipts import ReceiptSigning
from orchestrator.job.leaf_accounts import LeafAccounts
from orchestrator.job.outcome import Aborted, Committed, Fenced, Outcome
from orchestrator.job.persistence import PATIENCE_S
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.signals import Signals
from orchestrator.job.step_order import StepOrder
from orchestrator.job.uploading import AGAIN_S, Uploads
from orchestrator.job.voter import GRACE_S, SaveContext, Voter
from orchestrator.observe.events import Event, SaveCommitted, SaveNotCommitted, SaveStarted, emit
from orchestrator.options import Options
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import FORMAT, Cause, FileEntry, Intent
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import overlap
from orchestrator.storage.port import check_root

_NAMED = 4  # processes in a message
FATAL = (errors.Fenced, JournalLost)  # no later save can do better


class ParticipantFactory:
    """Begins this process's saves, one at a time, in epoch `epoch` (or the one that is `opened`). beside: what begins
    its saves of the same states elsewhere; an attempt has one name in both. Main thread."""

    def __init__(
        self,
        store: JournalStore,
        writer: ArrayWriter,
        rendezvous: Rendezvous,
        signals: Signals,
        coordinator: Coordinator | None,
        options: Options,
        *,
        epoch: int = 0,
        beside: ParticipantFactory | None = None,
        committed: Callable[[], None] = lambda: None,
        tell: Callable[[Event], None] = emit,
        admit: Callable[[AttemptId, int], None] = lambda attempt, need: None,
    ) -> None:
        bound_s = min(options.rendezvous_timeout_s, options.save_timeout_s)
        together, known = jax.process_count() > 1, beside.context.accounts if beside else None
        accounts = LeafAccounts(store, rendezvous, signals, bound_s, together=together, beside=known)
        order = StepOrder(rendezvous, signals)
        signing = ReceiptSigning.of(store, signals, rendezvous, options.save_timeout_s)
        shared = (store, writer, rendezvous, signals, coordinator, options, committed, accounts, order, epoch, signing)
        self.context: SaveContext = SaveContext(*shared, tell, admit)
        self.names: AttemptNames = beside.names if beside else AttemptNames()

    def opened(self, epoch: int) -> None:
        """Before the first save: the incarnation's epoch is open."""
        self.context = replace(self.context, epoch=epoch)

    def begin(self, step: int, user: UserData, process_state: bytes | None) -> Participant:
        """Name the next attempt at `step`."""
        epoch = self.context.epoch
        failpoints.note(step=step, epoch=epoch)
        attempt = self.names.next(step, epoch)
        self.context.order.begin(attempt)
        return Participant(self.context, attempt, user, process_state)


class Participant(Voter):
    """This process in one save: `start` on the main thread, all else in the background until `running` is False. Then
    `error` says why the step was not saved; None if it was.

    staged: all of this process's part has been taken; False if something kept it from that. blocked_s: for whoever
    calls `start` to note how long the save kept the main thread. durable_s: from start to commit, once committed.
    """

    def __init__(self, context: SaveContext, attempt: AttemptId, user: UserData, process_state: bytes | None) -> None:
        super().__init__(context, attempt, process_state)
        self.user = user
        self.blocked_s = self.durable_s = 0.0
        self.outcome: Outcome | None = None
        self.error: OrchestratorError | None = None
        self.staged = False
        self._other_step: Aborted | None = None  # how it ends, as process 0 saves another step instead
        self._intent: Intent | None = None
        self._thread: threading.Thread | None = None
        self._ended, self._pid = threading.Event(), os.getpid()
        self._follows, self._until_s = False, self.started_s + PATIENCE_S
        self._uploads = Uploads(context.signals, attempt, context.rendezvous.count)

    @property
    def begun(self) -> bool:
        """It goes on in the background, or has ended there."""
        return self._thread is not None

    @property
    def running(self) -> bool:
        # Not Thread.is_alive: up to Python 3.12 a Ctrl-C during `join` makes a running thread count as ended.
        return self.begun and not self._ended.is_set() and os.getpid() == self._pid  # a fork has no threads

    @property
    def stage_s(self) -> float:
        """Of the process that took longest to stage: on process 0, once committed."""
        return self.outcome.stage_s if isinstance(self.outcome, Committed) else 0.0

    @property
    def lost_in_memory(self) -> bool:
        """Not saved, as a process could not bring to the store what it has put into memory."""
        return isinstance(self.outcome, Aborted) and self.outcome.cause is Cause.MEMORY

    def join(self, timeout_s: float) -> None:
        """Return once it has ended, or after `timeout_s`."""
        if self.begun:
            self._ended.wait(timeout_s)

    @property
    def intent(self) -> Intent | None:
        """On process 0, once it has begun."""
        return self._intent

    # Open and stage: main thread.

    def fail(self, phase: str, cause: BaseException) -> None:
        """This process will vote to abort: `cause` has happened in `phase`."""
        self._phase, self._problem = phase, cause

    def reject(self, phase: str, cause: BaseException, kind: Cause = Cause.REJECTED) -> None:
        """Instead of `start`: tell the other processes, without touching storage, that this one takes no part. kind:
        what all of them count it as."""
        self._shared.signals.vote_abort(self._own.abort_vote(phase, cause, kind))
        if self._shared.coordinator:  # nobody else could decide it
            self._shared.signals.post_decision(self.id, Aborted(f"process 0 in {phase}: {cause}", kind))

    def start(self, flat: Flat) -> None:
        """Stage `flat` and go on in the background. Whatever fails from here on is this process's abort vote."""
        self._report("staging")
        began = time.monotonic()
        if not self._problem:
            try:
                self._stage(flat)
            except Exception as error:  # the other processes must hear of it
                self.fail("stage", error)
        self._own.seconds["stage"] = time.monotonic() - began
        self.staged = not self._problem
        if self._shared.coordinator:  # here, not in the thread: that one must not keep the state's device buffers alive
            self._intent = self._make_intent(flat)
        self._go_on()

    def _go_on(self) -> None:
        """In the background."""
        returned = threading.Event()
        thread = threading.Thread(target=self._run, args=(returned,), name=f"save-{self.step}", daemon=True)
        try:  # a Ctrl-C may come between any two of these
            thread.start()
            self._thread = thread
            self._shared.tell(SaveStarted(self.step, self.id.name, time.monotonic() - self.started_s))
        except RuntimeError:  # this process can have no more threads
            if not self.begun:
                self._own.release()
            raise
        finally:
            returned.set()

    def _stage(self, flat: Flat) -> None:
        check_root((shared := self._shared).store.storage)
        failpoints.hit("save.stage")
        held = shared.accounts.obtain(flat, self.id, self._saves_other_step)
        admit = partial(shared.admit, self.id)
        self._own.stage(shared.writer, flat, held, attest=shared.options.attest != "off", admit=admit)

    def _make_intent(self, flat: Flat) -> Intent:
        return Intent(
            format=FORMAT,
            write_id=uuid.uuid4().hex,
            step=self.step,
            attempt=self.id.name,
            epoch=self._shared.epoch,
            opened_by=self._shared.store.writer,
            time=self.user.timestamp,
            process_count=self._shared.rendezvous.count,
            device_count=jax.device_count(),
            mesh=flat.form.mesh,
            tree=self._shared.writer.recorded(flat.spec),
            built_on=self._shared.store.built_on,
            held=self._shared.accounts.account(flat),
        )

    # From here on in the background: vote, decision, outcome.

    def _run(self, returned: threading.Event) -> None:
        """Leaves what has come of the save in `outcome` and `error`."""
        returned.wait()  # the interpreter's lock, once lost, comes back after 5 ms: training goes first
        try:
            self._save()
        finally:
            self.part_over.set()
            self._ended.set()

    def _save(self) -> None:
        try:
            self.outcome = self._coordinate(self._shared.coordinator) if self._shared.coordinator else self._follow()
            self.error = self._error(self.outcome)
        except FATAL as error:
            self.error = error
        except Exception as error:  # nothing may be lost silently on a background thread
            self.error = self._not_saved(f"{type(error).__name__}: {error}")
        finally:
            self._own.release()
        if self.error:
            self._shared.accounts.forget()
            cause = self.outcome.cause if isinstance(self.outcome, Aborted) else Cause.FAILED
            cause = Cause.FENCED if isinstance(self.error, errors.Fenced) else cause
            self._shared.tell(SaveNotCommitted(self.step, self.id.name, str(self.error), cause))
        else:
            self.durable_s = time.monotonic() - self.started_s
            known = self.outcome if isinstance(self.outcome, Committed) else Committed()
            self._shared.tell(SaveCommitted(*self.id, self.durable_s, known.state_bytes, known.quarantined))
            self._shared.committed()

    def _coordinate(self, coordinator: Coordinator) -> Outcome:
        """Process 0: open the attempt while it writes its own part, then decide."""
        assert self._intent is not None
        opening = overlap.begin(partial(self._open, coordinator))
        self._shared.signals.post_saving(self.id)
        receipt = self._vote(opening)
        opening.wait(GRACE_S)  # nothing of this process should appear in an attempt that is decided
        opened: tuple[FileEntry, ...] = ()
        with contextlib.suppress(Exception):  # this process has voted to abort with it as the cause
            opened = opening.result(0)
        own = OwnPart(self._intent, self.user, self._own.pending, opened, receipt)
        return self._decide(coordinator, own)

    def _open(self, coordinator: Coordinator) -> tuple[FileEntry, ...]:
        assert self._intent is not None
        return coordinator.open(self._intent, self.user)

    def _decide(self, coordinator: Coordinator, own: OwnPart) -> Outcome:
        return coordinator.decide(own, self._left_s, partial(self._report, "committing"), longer=self._waits_on)

    def _follow(self) -> Outcome:
        """Any other process."""
        self._vote(None)
        if self._other_step:  # before it staged anything; what process 0 does next is no business of this one
            return self._other_step
        decision = DecisionReader(
            self.id, self._shared.epoch, self._shared.store, self._shared.signals, self._shared.rendezvous.hosts
        )
        within_s, alike = self.timeout_s + GRACE_S, self._shared.signing.alike
        return decision.wait(within_s, self._saves_other_step, self._finish_signing, alike, self._waits_on)

    def _waits_on(self) -> bool:
        """There is no more time for a save; but others may take longer, as they upload their parts."""
        hosts, mine = self._shared.rendezvous.hosts, self.part_over.is_set() and self.part_whole
        elapsed_s = time.monotonic() - self.started_s
        going_on = self._uploads.going_on() if mine and time.monotonic() < self._until_s else []
        self._follows = bool(going_on)
        if going_on:
            who = ", ".join(f"process {process} ({hosts.get(process, '?')})" for process in going_on[:_NAMED])
            more = f" and {len(going_on) - _NAMED} more" if len(going_on) > _NAMED else ""
            text = "%s: this process has saved its part; after %.0f s it waits for %s%s, still uploading from memory"
            logging.log_every_n_seconds(logging.WARNING, text, 30, self.label, elapsed_s, who, more)
        return self._follows

    @property
    def takes_long(self) -> bool:
        """It may take longer than a save, as parts come from memory."""
        return self._follows

    def give_up(self, reason: str) -> None:
        """There is no time for what takes long; those who upload hear the same, so their decision is about to come."""
        self._until_s = min(self._until_s, time.monotonic() + GRACE_S - AGAIN_S)

    def _saves_other_step(self) -> Aborted | None:
        self._other_step = self._shared.order.other_step(self.id, self._shared.store.built_on)
        return self._other_step

    def _error(self, outcome: Outcome) -> OrchestratorError | None:
        if isinstance(self._problem, errors.Fenced):  # final for this process, whatever the others decide
            return self._problem
        match outcome:
            case Committed():
                return None
            case Fenced(reason):
                return errors.Fenced(f"{self.label}: {reason}; this process must stop")
            case Aborted(reason):
                return self._not_saved(reason)
        assert_never(outcome)

    def _not_saved(self, reason: str) -> SaveFailed:
        return SaveFailed(f"{self.label} was not saved: {reason}", step=self.step, attempt=self.id.name)

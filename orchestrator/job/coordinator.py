"""The coordinator: process 0's background role for one save. Performs what the state machine in `rules.attempt` asks.

Runs on one background thread of process 0. It never runs a collective and never waits without a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import assert_never

from absl import logging

from orchestrator import failpoints
from orchestrator.errors import Fenced, OrchestratorError, RootChanged
from orchestrator.job import outcome
from orchestrator.job.finalize import OwnPart, UserData, create, finalize
from orchestrator.job.notices import Notices
from orchestrator.job.outcome import Outcome
from orchestrator.job.receipts import ReceiptReader
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.signals import Signals
from orchestrator.policy import JudgesNewest, KeepPolicy
from orchestrator.rules import journal, json_numbers, keys, removal
from orchestrator.rules.attempt import (
    AppendAbort,
    AppendCommit,
    Appended,
    Attempt,
    Effect,
    Event,
    FencedOff,
    Finalize,
    FinalizeDone,
    FinalizeFailed,
    Phase,
    advance,
)
from orchestrator.rules.codec import encode
from orchestrator.rules.records import FORMAT, Cause, Extra, Failure, FileEntry, Head, Intent, LiveStep
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun


class Coordinator:
    """How attempts of this run are opened and decided. It keeps nothing of one attempt for the next."""

    def __init__(
        self,
        store: JournalStore,
        rendezvous: Rendezvous,
        signals: Signals,
        *,
        keep: KeepPolicy | None,
        quarantine_keep_s: float | None = None,
        host_local: str = "warn",
    ) -> None:
        self._store, self._rendezvous, self._signals = store, rendezvous, signals
        self._keep, self._quarantine_keep_s, self._host_local = keep, quarantine_keep_s, host_local
        self._notices = Notices()

    def open(self, intent: Intent, user: UserData) -> tuple[FileEntry, ...]:
        """Write the attempt's intent and the user's data; returns their entries, for `OwnPart.opened`. Raises if
        another writer already uses this attempt's name. Any thread, while this process writes its arrays."""
        self._notices.missing_metric(intent.step, self._keep, user.metrics)
        extra = Extra(
            format=FORMAT,
            write_id=self._store.stamp().write_id,
            step=intent.step,
            timestamp=user.timestamp,
            stored_metrics=json_numbers.stored_all(user.metrics),
            stored_extra={name: json_numbers.pack(value) for name, value in user.extra.items()},
        )

        def create_intent() -> FileEntry:
            failpoints.hit("intent.before")
            written = create(self._store, intent, keys.INTENT, encode(intent))
            failpoints.hit("intent.after")
            return written

        create_extra = partial(create, self._store, intent, keys.EXTRA, encode(extra))
        return tuple(overlap.together(create_intent, create_extra))

    def decide(
        self,
        own: OwnPart,
        timeout_s: float,
        all_in: Callable[[], None] = lambda: None,
        given_up: Callable[[], bool] = lambda: False,
        longer: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Collect receipts until all are in, one process votes to abort or `timeout_s` has passed (or `given_up` says
        as much; and `longer` does not ask for more); commit or abort; post the decision. `all_in` is called when all
        are in and the commit begins.

        Raises StorageError if the outcome could not be journalled: then the attempt is either not committed (and a
        later epoch collects it) or committed, and nobody knows.
        """
        attempt = own.intent.id
        try:
            decided = self._decided(own, timeout_s, all_in, given_up, longer)
        except Exception as error:  # the others wait for a decision; the caller gets the error itself
            cause = Cause.FENCED if isinstance(error, Fenced) else Cause.FAILED
            reason = f"the outcome could not be journalled: {error}"
            self._signals.post_decision(attempt, outcome.Aborted(reason, cause))
            raise
        self._signals.post_decision(attempt, decided)
        return decided

    def _decided(
        self,
        own: OwnPart,
        timeout_s: float,
        all_in: Callable[[], None],
        given_up: Callable[[], bool],
        longer: Callable[[], bool],
    ) -> Outcome:
        state = Attempt(own.intent, own_must_agree=self._host_local == "error")
        receipts = ReceiptReader(self._store, self._signals, self._rendezvous.hosts, state, own.receipt)
        state, effect = receipts.collect(timeout_s, given_up, longer)
        self._signals.forget_previous(own.intent.id)
        if state.phase is Phase.FINALIZING:
            all_in()
            if self._host_local == "warn":
                self._notices.host_local(state)
        commit = _Commit(self._store, own, receipts.files, self._keep, self._quarantine_keep_s)
        while effect is not None:
            state, effect = advance(state, self._perform(effect, state, commit, own.persist))
        return _ended_as(state, commit)

    def _perform(
        self, effect: Effect, state: Attempt, commit: _Commit, persist: Callable[[Callable[[], None]], None]
    ) -> Event:
        try:
            match effect:
                case Finalize():
                    try:
                        persist(partial(commit.finalize, state))
                    except Exception as error:  # whatever it was: the attempt is aborted with it as the cause
                        cause = f"{type(error).__name__}: {error}"
                        host = self._rendezvous.hosts[0]
                        failure = Failure(process=0, host=host, phase="finalize", cause=cause, kind=Cause.FINALIZE)
                        return FinalizeFailed(failure)
                    return FinalizeDone()
                case AppendCommit():
                    persist(commit.append)
                    return Appended()
                case AppendAbort():
                    self._append_abort(state)
                    return Appended()
                case _:
                    assert_never(effect)
        except RootChanged:  # there is no head to ask any more
            raise
        except Fenced:
            head = self._store.require_head()
            return FencedOff(head.epoch, head.writer)

    def _append_abort(self, state: Attempt) -> None:
        failpoints.hit("abort.before")
        self._store.append(
            partial(
                journal.abort,
                epoch=state.intent.epoch,
                attempt=state.intent.id,
                failures=state.failures,
                reason=state.reason,
                cause=state.cause or Cause.FAILED,
            )
        )
        failpoints.hit("abort.after")


class _Commit:
    """Of one attempt: `finalize`, then `append`. line: what the journal says of the step, once it is finalized."""

    def __init__(
        self,
        store: JournalStore,
        own: OwnPart,
        receipt_files: dict[str, FileEntry],
        keep: KeepPolicy | None,
        quarantine_keep_s: float | None,
    ) -> None:
        self._store, self._own, self._receipt_files = store, own, receipt_files
        self._keep, self._quarantine_keep_s = keep, quarantine_keep_s
        self._head: Begun[Head | None] | None = None
        self.line: LiveStep | None = None
        self.quarantined = -1  # in the head that holds the commit

    def finalize(self, state: Attempt) -> None:
        failpoints.hit("finalize.before")
        self._head = overlap.begin(self._store.head)  # it takes as long as what comes next
        self.line = finalize(self._store, self._own, state, self._receipt_files)

    def append(self) -> None:
        assert self.line is not None
        failpoints.hit("commit.before")
        rule = partial(
            journal.commit,
            epoch=self._own.intent.epoch,
            entry=self.line,
            keep=self._keep,
            quarantine_keep_s=self._quarantine_keep_s,
        )
        head = self._store.append(rule, self._head)
        self.quarantined = len(head.quarantined) if head else 0
        failpoints.hit("commit.after")
        self._let_newest_go()

    def _let_newest_go(self) -> None:
        """Before the others hear of the commit: they find the steps that process 0 finds."""
        if not isinstance(self._keep, JudgesNewest) or not self._keep.judges_newest:
            return
        try:
            self._store.append(partial(removal.unwanted_newest, epoch=self._own.intent.epoch, keep=self._keep))
        except OrchestratorError as error:  # the step is saved; the next commit retires it
            logging.warning("%s: the newest step stays for now: %s", self._own.intent.id.label, error)


def _ended_as(state: Attempt, commit: _Commit) -> Outcome:
    if state.phase is Phase.COMMITTED:
        assert commit.line is not None
        stage_s = max(receipt.seconds.get("stage", 0.0) for receipt in state.receipts.values())
        return outcome.Committed(commit.line.bytes, stage_s, commit.quarantined)
    causes = [f"process {f.process} ({f.host}) in {f.phase}: {f.cause}" for f in state.failures]
    reason = "; ".join([state.reason, *causes])
    if state.phase is Phase.FENCED:
        return outcome.Fenced(reason)
    return outcome.Aborted(reason, state.cause or Cause.FAILED)

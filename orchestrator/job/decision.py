"""How a process other than 0 learns the decision about an attempt: from process 0's signal, or from the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from absl import logging

from orchestrator.errors import StorageError, WaitTimeout
from orchestrator.job.outcome import Aborted, Committed, Fenced, Outcome
from orchestrator.job.poll import REAL, Clock, among, poll
from orchestrator.job.signals import Signals
from orchestrator.job.uploading import AGAIN_S
from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.run.journal_store import JournalStore


class DecisionReader:
    """Of one attempt of epoch `epoch`. `hosts` names the processes."""

    def __init__(
        self,
        attempt: AttemptId,
        epoch: int,
        store: JournalStore,
        signals: Signals,
        hosts: Mapping[int, str],
        clock: Clock = REAL,
    ) -> None:
        self._attempt, self._epoch, self._store, self._signals = attempt, epoch, store, signals
        self._hosts, self._clock = hosts, clock

    def wait(
        self,
        timeout_s: float,
        other_step: Callable[[], Aborted | None],
        meanwhile: Callable[[], None] = lambda: None,
        askers: int = 1,
        longer: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """How the attempt ended. `other_step`: the outcome if process 0 saves another step instead; asked once a
        second, with the journal. `meanwhile` is called while nothing is known. askers: how many processes wait like
        this one. longer: asked at the deadline and after it, whether to wait on. Raises WaitTimeout naming process 0.
        """
        began, waited_s = self._clock.now(), timeout_s

        def late() -> Outcome | None:
            if longer():
                return None
            text = f"no decision from the coordinator, process 0 ({self._hosts[0]}), after {waited_s:g} s"
            raise WaitTimeout(text)

        def signalled() -> Outcome | None:
            decided = self._signals.decision(self._attempt)
            if decided is None:
                meanwhile()
            return decided

        left_s = timeout_s
        while True:
            decided = poll(
                signalled,
                left_s,
                late,
                storage=lambda: self.journalled() or other_step(),
                pause=among(askers),
                clock=self._clock,
            )
            if decided is not None:
                return decided
            left_s, waited_s = AGAIN_S, round(self._clock.now() - began + AGAIN_S, 1)

    def journalled(self) -> Outcome | None:
        """What the journal says, once that is durable; None if it does not say (yet)."""
        try:
            head = self._store.durable_head()
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s: the journal cannot be read yet: %s", self._attempt.label, error)
            return None
        if journal.is_live(head, self._attempt):
            return Committed()
        if head.epoch > self._epoch:
            return Fenced(f"fenced by epoch {head.epoch} ({head.writer})")
        if journal.is_retired(head, self._attempt):
            reason, cause = journal.abort_of(head, self._attempt)
            return Aborted(f"journal version {head.version}: {reason}", cause)
        return None

"""All processes save the same steps in the same order. One that finds process 0 at another step than its own votes to
abort both attempts, so that nobody waits for a deadline.
"""

from __future__ import annotations

from collections import deque

from msgspec.structs import replace

from orchestrator.job.outcome import Aborted
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.signals import Signals, abort_vote
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Cause, Failure

_ATTEMPTS = 64  # begun by this process, remembered


class StepOrder:
    """The attempts that this process has begun, and whether process 0 is at one of them. Any thread."""

    def __init__(self, rendezvous: Rendezvous, signals: Signals) -> None:
        self._rendezvous, self._signals = rendezvous, signals
        self._begun: deque[AttemptId] = deque(maxlen=_ATTEMPTS)

    def begin(self, attempt: AttemptId) -> None:
        self._begun.append(attempt)

    def other_step(self, attempt: AttemptId, built_on: int) -> Aborted | None:
        """How `attempt` ends if process 0 saves another step instead: one that this process has not begun. Neither
        could be committed; both hear of it now, and not at their deadlines. built_on: as in a receipt."""
        theirs = self._signals.saving()
        if theirs is None or theirs in self._begun:
            return None
        if self._signals.decision(attempt):
            return None  # it has just decided this one, and gone on: a decision is posted before the next save is
        process, hosts = self._rendezvous.process, self._rendezvous.hosts
        reason = (
            f"process 0 ({hosts[0]}) saves step {theirs.step} where process {process} ({hosts[process]}) saves step "
            f"{attempt.step}; all must save the same steps in the same order"
        )
        failure = Failure(process=process, host=hosts[process], phase="agree", cause=f"UsageError: {reason}")
        vote = abort_vote(attempt, failure, built_on=built_on)
        for each in (theirs, attempt):
            self._signals.vote_abort(replace(vote, step=each.step, attempt=each.name))
        return Aborted(reason, Cause.REJECTED)

"""A process that is at another step than process 0 says so at once, for both attempts."""

from __future__ import annotations

from orchestrator.job.outcome import Committed
from orchestrator.job.signals import Signals
from orchestrator.job.step_order import StepOrder
from orchestrator.rules.attempt_id import AttemptId
from tests.support import builders
from tests.support.fakes import FakeBoard


def test_a_process_that_saves_another_step_than_process_0_votes_to_abort_both() -> None:
    board = FakeBoard(1, 2)
    signals = Signals(board, "i")
    order = StepOrder(board, signals)
    first, second, third = (AttemptId(step, builders.FIRST) for step in (1, 2, 3))
    order.begin(first)
    order.begin(third)
    assert order.other_step(third, 0) is None  # nothing has been heard of process 0
    signals.post_saving(first)
    assert order.other_step(third, 0) is None  # process 0 is behind: this one has been there
    signals.post_saving(second)
    signals.post_decision(third, Committed())
    assert order.other_step(third, 0) is None  # process 0 has just decided this very attempt, and begun the next
    signals.forget_previous(third)
    signals.forget_previous(first)
    outcome = order.other_step(third, 0)
    expected = "process 0 (host-0) saves step 2 where process 1 (host-1) saves step 3; all must save the same steps"
    assert outcome and outcome.reason.startswith(expected)
    for attempt in (second, third):
        vote = signals.votes(attempt)[1]
        assert vote and vote.failure and vote.failure.phase == "agree" and expected in vote.failure.cause

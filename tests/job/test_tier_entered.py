"""When process 0 may call a step held."""

from __future__ import annotations

from orchestrator.job.poll import Clock
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.tier_entered import Entered
from orchestrator.rules.attempt_id import AttemptId

FIRST, SECOND = AttemptId.of(20, 1, 1), AttemptId.of(40, 1, 1)


def test_a_step_is_held_when_all_who_must_have_entered_it_have_and_who_has_not_is_named() -> None:
    board, now = SingleProcess(), [0.0]
    clock = Clock(lambda: now[0], lambda left_s: now.__setitem__(0, now[0] + left_s))
    entered = Entered(board, "job", clock)
    assert entered.missing(FIRST, [], 10) == [] and now[0] == 0
    board.process = 3
    entered.say(FIRST)
    assert entered.missing(FIRST, [3], 10) == [] and now[0] == 0
    assert entered.missing(FIRST, [3, 5], 10) == [5] and now[0] >= 10
    assert entered.missing(SECOND, [3], 10) == [3]  # another step's is none
    assert Entered(board, "another start", clock).missing(FIRST, [3], 1) == [3]

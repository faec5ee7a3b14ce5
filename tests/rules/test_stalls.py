"""Who holds a job up: a table of signs of life, and what they mean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.rules.stalls import Condition, Diagnosis, Sign, diagnose, hung, hung_alone

M, S, W, K, F, L = (
    Diagnosis(each)
    for each in (
        Condition.MOVING,
        Condition.STARTING,
        Condition.WAITING,
        Condition.STUCK,
        Condition.FROZEN,
        Condition.LEFT,
    )
)


def waits(*processes: int) -> Diagnosis:
    return Diagnosis(Condition.WAITING, processes)


GOES = Sign(0.2, pulse_age_s=1.0, step=41, steps=40, step_s=0.2)
STANDS = replace(GOES, idle_s=60.0)
FROZEN = replace(GOES, idle_s=20.0, pulse_age_s=20.0)
STOPPED, DEAD = replace(GOES, process="stopped"), replace(GOES, process="ended")
STOPPED_ONE, D = Diagnosis(Condition.FROZEN, stopped=True), Diagnosis(Condition.DEAD)
COMPILES = replace(GOES, idle_s=500.0, step=None, steps=0, step_s=0.0)
IN_BARRIER = replace(STANDS, barrier="step 41?")
OLD = Sign(0.2, step=41)

TABLE = {
    "all go": ([GOES, GOES], [M, M]),
    "one is frozen": ([replace(GOES, idle_s=20.0), FROZEN, replace(GOES, idle_s=20.0)], [waits(1), F, waits(1)]),
    "one is frozen, and steps are slow": ([replace(GOES, idle_s=20.0, step_s=9.0), FROZEN], [M, F]),
    "two are frozen": ([FROZEN, FROZEN, STANDS], [F, F, waits(0, 1)]),
    "all are frozen": ([FROZEN, FROZEN], [F, F]),
    "one is stopped, and its pulse is young": ([replace(GOES, idle_s=6.0), STOPPED], [waits(1), STOPPED_ONE]),
    "one is dead, and its pulse is young": ([replace(GOES, idle_s=6.0), DEAD], [waits(1), D]),
    "one is dead, and had left": ([GOES, replace(DEAD, left=True)], [M, L]),
    "one has no pulse, and its process is there": ([GOES, replace(FROZEN, process="here")], [M, F]),
    "all compile": ([COMPILES, COMPILES], [S, S]),
    "one freezes while all compile": ([COMPILES, FROZEN], [Diagnosis(Condition.STARTING, (1,)), F]),
    "one does not come to a barrier": ([IN_BARRIER, STANDS, IN_BARRIER], [waits(1), K, waits(1)]),
    "one still compiles before a barrier": ([replace(IN_BARRIER, steps=0), COMPILES], [waits(1), S]),
    "one still moves before a barrier": ([IN_BARRIER, GOES], [waits(1), M]),
    "all are in a barrier": ([IN_BARRIER, IN_BARRIER], [K, K]),
    "one stands at an earlier step": ([STANDS, replace(STANDS, step=40)], [waits(1), K]),
    "all stand at one step": ([STANDS, STANDS], [K, K]),
    "a step that always takes so long": ([replace(STANDS, step_s=7.0)], [M]),
    "one has left": ([GOES, replace(FROZEN, left=True)], [M, L]),
    "no pulses: an older version": ([OLD, OLD], [M, M]),
    "no pulses, and all stand": ([replace(OLD, idle_s=60.0)] * 2, [K, K]),
    "nobody": ([], []),
}


@pytest.mark.parametrize("case", TABLE)
def test_each_host_is_seen_as_what_it_is(case: str) -> None:
    signs, expected = TABLE[case]
    assert list(diagnose(dict(enumerate(signs))).values()) == expected


LONG, LIMIT_S = 901.0, 900.0
OVER = replace(GOES, idle_s=LONG)
HUNG = {
    "none": ([GOES, STANDS], set()),
    "the frozen one, not those that wait": ([OVER, replace(OVER, pulse_age_s=LONG), OVER], {1}),
    "the frozen one a moment later": ([OVER, replace(OVER, idle_s=899.5, pulse_age_s=899.0)], set()),
    "who did not come to a barrier": ([replace(OVER, barrier="b"), OVER], {1}),
    "who is behind": ([OVER, replace(OVER, step=40)], {1}),
    "all, if nothing tells them apart": ([OVER, OVER], {0, 1}),
    "all of an older version": ([replace(OLD, idle_s=LONG)] * 2, {0, 1}),
    "nobody who compiles": ([replace(COMPILES, idle_s=LONG)] * 2, set()),
    "who compiles for ever": ([replace(COMPILES, idle_s=4 * LONG), replace(COMPILES, idle_s=1.0)], {0}),
    "who is frozen while it compiles": ([replace(COMPILES, idle_s=LONG, pulse_age_s=LONG), COMPILES], {0}),
    "who waits for half as long again": ([replace(OVER, idle_s=1360.0), FROZEN], {0}),
    "nobody who has left": ([replace(OVER, left=True), GOES], set()),
}


@pytest.mark.parametrize("case", HUNG)
def test_whoever_holds_the_job_up_is_ended_and_nobody_who_waits(case: str) -> None:
    signs, expected = HUNG[case]
    assert hung(dict(enumerate(signs)), LIMIT_S) == expected


ALONE = {
    "goes": (GOES, False),
    "an older version, in time": (replace(OLD, idle_s=899.0), False),
    "an older version": (replace(OLD, idle_s=LONG), True),
    "frozen": (replace(GOES, idle_s=LONG, pulse_age_s=LONG), True),
    "stands, perhaps for another": (OVER, False),
    "stands for half as long again": (replace(OVER, idle_s=1351.0), True),
    "waits in a barrier": (replace(OVER, barrier="b"), False),
    "compiles": (replace(COMPILES, idle_s=3599.0), False),
    "compiles for ever": (replace(COMPILES, idle_s=3601.0), True),
    "frozen in its first step": (replace(COMPILES, idle_s=LONG, pulse_age_s=LONG), True),
    "left": (replace(FROZEN, idle_s=9999.0, left=True), False),
}


@pytest.mark.parametrize("case", ALONE)
def test_a_host_alone_is_ended_when_it_cannot_be_another_who_holds_it_up(case: str) -> None:
    sign, expected = ALONE[case]
    assert hung_alone(sign, LIMIT_S) is expected

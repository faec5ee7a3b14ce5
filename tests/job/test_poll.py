"""The one bounded wait: what is asked how often, and what comes of a deadline, with a clock that does not wait."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.errors import WaitTimeout
from orchestrator.job.poll import SIGNALS, STORAGE_S, Pause, poll, timed_out
from tests.support.fakes import StepClock

LATE = timed_out("no answer from process 3 (host-d) after 5 s")


def test_an_answer_that_is_there_costs_no_pause() -> None:
    time = StepClock()
    assert poll(lambda: "there", 0.0, LATE, clock=time.clock) == "there"
    assert time.slept == []


def test_false_and_zero_are_answers() -> None:
    assert poll(lambda: False, 1.0, LATE) is False
    assert poll(lambda: 0, 1.0, LATE) == 0


@pytest.mark.parametrize(
    ("pause", "slept"),
    [
        (Pause(0.5, 0.5), [0.5] * 4),
        (Pause(0.1, 1.0, growth=1.0), [0.1, 0.2, 0.4, 0.8, 0.5]),  # doubles; the last is what is left
        (Pause(0.1, 0.3, growth=1.0), [0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.2]),
    ],
)
def test_pauses_grow_to_a_bound_and_end_at_the_deadline(pause: Pause, slept: list[float]) -> None:
    time = StepClock()
    with pytest.raises(WaitTimeout, match=r"process 3 \(host-d\) after 5 s"):
        poll(lambda: None, 2.0, LATE, pause=pause, clock=time.clock)
    assert time.slept == pytest.approx(slept)


def test_the_first_signals_are_looked_for_every_2_ms_and_late_ones_every_10() -> None:
    time = StepClock()
    poll(time.after(1.0), 5.0, LATE, clock=time.clock)
    assert time.slept[0] == SIGNALS.first_s and max(time.slept) == SIGNALS.longest_s
    assert sum(time.slept) < 1.0 + SIGNALS.longest_s


@pytest.mark.parametrize(("answer_s", "found"), [(4.999, True), (5.0, True), (5.001, False)])
def test_the_deadline_is_looked_at_once_more(answer_s: float, found: bool) -> None:
    time = StepClock()
    look = time.after(answer_s)
    assert poll(look, 5.0, lambda: "late", pause=Pause(0.7, 0.7), clock=time.clock) == ("there" if found else "late")


def test_storage_is_asked_once_a_second_however_often_signals_are() -> None:
    time, asked, looks = StepClock(), list[float](), list[float]()
    in_storage = time.after(3.5)

    def look() -> None:
        looks.append(time.now_s)

    def storage() -> str | None:
        asked.append(time.now_s)
        time.now_s += 0.25  # a slow store's seconds count, too
        return in_storage()

    assert poll(look, 60.0, LATE, storage=storage, clock=time.clock) == "there"
    assert len(looks) > 100 and 3 <= len(asked) <= 4
    assert all(later - earlier >= STORAGE_S for earlier, later in itertools.pairwise(asked))


def test_what_a_look_raises_ends_the_wait() -> None:
    def look() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        poll(look, 5.0, LATE)

"""How often to save, and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestrator as oc
from orchestrator.policy import Adaptive, auto, every
from orchestrator.rules import save_interval
from orchestrator.rules.records import Head
from orchestrator.rules.save_interval import PRIOR_S, Costs, History
from tests.support.builders import head

HOUR = 3600.0


def costs(**more: float) -> Costs:
    plain = {"blocked_s": 0.5, "durable_s": 4.0, "restart_s": 60.0, "interruptions": 9, "running_s": 10 * HOUR}
    return Costs(**{**plain, **more})  # type: ignore[arg-type]


def test_the_optimum_is_young_and_dalys() -> None:
    young = (2 * 30 * 24 * HOUR) ** 0.5  # 30 s a save, one failure a day: 2277 s
    assert save_interval.optimal_interval_s(30, 24 * HOUR) == pytest.approx(young - 20, abs=1)
    assert save_interval.optimal_interval_s(30, 10) == 10  # Daly: where a save takes longer than the job lives


@given(
    blocked_s=st.floats(0.01, 100),
    durable_s=st.floats(0, 600),
    restart_s=st.floats(0, 3600),
    interruptions=st.integers(0, 100),
    running_s=st.floats(0, 1e7),
)
def test_no_other_interval_has_a_goodput_that_is_better_by_a_hundredth(
    blocked_s: float, durable_s: float, restart_s: float, interruptions: int, running_s: float
) -> None:
    measured = Costs(blocked_s, durable_s, restart_s, interruptions, running_s)
    chosen = save_interval.optimal_interval_s(blocked_s, measured.mtbf_s)
    others = save_interval.goodputs(measured, [chosen * 1.25**power for power in range(-20, 21)])
    best = max(share for _, share in others)
    assert 0 < save_interval.goodput(chosen, measured) <= 1
    assert save_interval.goodput(chosen, measured) >= 0.99 * best


def test_the_choice_keeps_to_what_may_be_lost_and_to_what_a_save_takes_and_says_so() -> None:
    free = save_interval.choose(costs(), max_loss_s=1e6)
    assert free.interval_s == save_interval.optimal_interval_s(0.5, free.costs.mtbf_s)
    assert free.because == (
        "every 110 s: a save blocks training for 0.5 s; 9 interruptions in 10.0 h, so one in 3.4 h expected: "
        "the optimum is 110 s"
    ), free.because
    bounded = save_interval.choose(costs(), max_loss_s=60)
    assert bounded.interval_s == 56
    assert "max_loss_s=60 less 4 s until a save is durable is shorter" in bounded.because
    slow = save_interval.choose(costs(durable_s=300.0), max_loss_s=1000)
    assert slow.interval_s == 300
    assert "a save is durable only after 5.0 min" in slow.because
    hopeless = save_interval.choose(costs(durable_s=300.0), max_loss_s=400)
    assert hopeless.interval_s == 300
    assert "up to 10.0 min can be lost, more than max_loss_s=400" in hopeless.because


def test_more_failures_make_saves_more_frequent_and_dearer_saves_less() -> None:
    assert costs(interruptions=99).mtbf_s < costs().mtbf_s < Costs(1, 1, 1, 0, 0.0).mtbf_s == PRIOR_S
    few, many = save_interval.choose(costs(), 1e6), save_interval.choose(costs(interruptions=99), 1e6)
    dear = save_interval.choose(costs(blocked_s=20.0), 1e6)
    assert many.interval_s < few.interval_s < dear.interval_s
    assert dear.goodput < few.goodput


def entries(*epochs: tuple[float, int]) -> list[Head]:
    """A journal: for each epoch when it opened and how many entries it has, one a second."""
    made: list[Head] = []
    for epoch, (opened, count) in enumerate(epochs, start=1):
        made += [head(epoch=epoch, version=len(made) + at, time=opened + at) for at in range(count)]
    return made


def test_the_history_is_what_the_epochs_of_the_journal_show() -> None:
    assert save_interval.history([]) == History()
    assert save_interval.history(entries((0, 5))) == History(0, 4.0, 0.0)
    assert save_interval.history(entries((0, 5), (10, 3), (100, 1))) == History(2, 6.0, (6 + 88) / 2)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_a_few_entries_of_a_journal_tell_the_same_as_all(sizes: list[int]) -> None:
    journal = entries(*((1000.0 * number, size) for number, size in enumerate(sizes)))
    read: list[int] = []

    def entry(version: int) -> Head:
        read.append(version)
        return journal[version]

    found = save_interval.borders(journal[-1], entry, epochs_max=len(sizes))
    assert save_interval.history(found) == save_interval.history(journal)
    assert len(read) <= 2 * sum(size.bit_length() + 1 for size in sizes)


def test_only_the_newest_epochs_of_a_long_journal_are_read() -> None:
    journal = entries(*((1000.0 * number, 3) for number in range(40)))
    assert {each.epoch for each in save_interval.borders(journal[-1], journal.__getitem__, epochs_max=4)} >= {
        37,
        38,
        39,
        40,
    }
    assert (
        save_interval.history(save_interval.borders(journal[-1], journal.__getitem__, epochs_max=4)).interruptions <= 4
    )


def test_auto_is_due_at_once_then_at_what_may_be_lost_then_at_what_it_has_chosen() -> None:
    policy = auto(max_loss_s=100)
    assert [policy.due(1, elapsed) for elapsed in (None, 99.0, 100.0)] == [True, False, True]
    told = policy.informed(costs(durable_s=2.0))
    assert told.cadence is not None and told.cadence.interval_s == 98
    assert [told.due(1, elapsed) for elapsed in (None, 97.0, 98.0)] == [True, False, True]
    both = every(7) | policy
    assert isinstance(both, Adaptive) and both.timed and both.cadence is None
    assert both.informed(costs()).due(14, 0.0) and not both.informed(costs()).due(15, 0.0)
    with pytest.raises(oc.UsageError, match="expected a positive number"):
        auto(0)

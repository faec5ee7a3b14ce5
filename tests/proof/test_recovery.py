"""The recovery campaign's own rules: what it kills, and what it calls a lie. `make recovery` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.proof.recovery import job, report
from tests.proof.recovery.rounds import HOSTS, Line, Round, judge, outside, within

ROUNDS = 100


def test_a_seed_makes_the_same_rounds_and_what_they_lose_is_what_they_say() -> None:
    for seed in range(20):
        for number in range(ROUNDS):
            one = within(seed, number, ROUNDS)
            assert one == within(seed, number, ROUNDS)
            assert one.lost or one.crashed
            assert not set(one.lost) & set(one.crashed)
            assert not one.lost or any(set(one.lost) <= set(group) for group in one.setting.groups)
            assert len(outside(seed, number).lost) >= 3  # more than any setting's copies
    assert {within(1, number, ROUNDS).kind for number in range(ROUNDS)} == {
        "hosts lost",
        "hosts lost, others crash",
        "processes crash",
        "lost twice",
    }


def said(event: str, restart: int, steps: list[int], **more: Any) -> list[Line]:
    """One line of each host."""
    made = enumerate(steps)
    return [
        {"event": event, "process": host, "restart": restart, "time": 10.0, "step": at, **more} for host, at in made
    ]


def story(restored: list[int], *, store: int = 0, right: bool = True, held: list[int] | None = None) -> list[Line]:
    """Hosts were told of held steps in start 0, and came back in start 1; step 4 is committed."""
    lines = said("SaveCommitted", 0, [4] * HOSTS) + said("StepHeld", 0, [8] * HOSTS)
    lines += said("StepHeld", 0, held or [12] * HOSTS)
    lines += said("restored", 1, restored, sources={"memory": 7, "store": store})
    return lines + said("checked", 1, restored, right=right) + said("step", 1, [step + 1 for step in restored])


LOST = Round(0, within(1, 0, ROUNDS).setting, "hosts lost", (3,), (), 0.0)
OUTSIDE = outside(1, 0)


@pytest.mark.parametrize(
    ("one", "lines", "problem"),
    [
        (LOST, story([12] * 4), ""),
        (LOST, story([16] * 4), ""),  # held, and the kill came before anybody was told
        (LOST, story([8] * 4), "step 12 was there"),
        (LOST, story([8] * 4, held=[8, 12, 12, 12]), ""),  # one survivor was not told
        (LOST, story([8] * 4, held=[12, 12, 12, 8]), "step 12 was there"),  # the lost host need not have been
        (LOST, story([12, 12, 8, 12]), "different steps"),
        (LOST, story([12] * 4, store=1), "bytes of arrays from the store"),
        (LOST, story([12] * 4, right=False), "wrong bits"),
        (OUTSIDE, story([4] * 4, store=1), ""),
        (OUTSIDE, story([0] * 4, store=1), "step 4 was there"),
        (OUTSIDE, story([4] * 4, right=False), "wrong bits"),
        (OUTSIDE, story([99] * 4), "nobody has trained"),
    ],
)
def test_what_came_back_is_judged_by_what_survivors_were_told(one: Round, lines: list[Line], problem: str) -> None:
    verdict = judge(one, lines, killed=0, back=1, killed_s=4.0)
    assert verdict.seconds == 6.0
    assert (problem in verdict.problems[0]) if problem else verdict.problems == []


def test_the_state_after_a_step_tells_that_each_batch_was_trained_once_and_in_order() -> None:
    loader, rows, at = job.Loader(), 8, (slice(2, 6), slice(0, job.COLUMNS))
    state = job.first(3, rows, at)
    for step in range(5):
        state = state * np.uint32(job.FACTOR) + np.uint32(loader.next())
        a, b = job.after(step)
        assert np.array_equal(state, job.first(3, rows, at) * np.uint32(a) + np.uint32(b))
    position = loader.position()
    expected = loader.next()
    other = job.Loader()
    other.restore(position)
    assert other.next() == expected != job.Loader().next()


def test_the_table_counts_rounds_and_shows_the_slowest() -> None:
    made = [
        {"seed": 1, "within": True, "round": number, "setting": "one", "kind": "lost", "seconds": float(number)}
        | {"problems": ["lie"] if number == 7 else []}
        for number in range(100)
    ]
    assert "| **all** | within the promise | 100 | 99 | 49.0 s | 98.0 s |" in report.table(made)


def test_a_table_takes_the_place_of_the_one_before_and_of_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n")
    report.write(page, "one", "| new |\n\n")
    assert page.read_text() == "before\n<!-- one: begin -->\n| new |\n<!-- one: end -->\nafter\n"
    with pytest.raises(ValueError, match="two: begin"):
        report.write(page, "two", "| new |")

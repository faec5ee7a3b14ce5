"""The recovery campaign's own rules: what it kills, and what it calls a lie. `make recovery` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import lines
from tests.proof.recovery import job, report, restarts
from tests.proof.recovery.rounds import HOSTS, Line, Round, held_by_all, judge, outside, within

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


def story(
    restored: list[int],
    *,
    store: int = 0,
    right: bool = True,
    held: list[int] | None = None,
    committed: int = 4,
    but: str = "",
) -> list[Line]:
    """Hosts were told of held steps in start 0, and came back in start 1; one is committed. but: what nobody said."""
    lines = said("SaveCommitted", 0, [committed] * HOSTS) + said("step", 0, [8] * HOSTS)
    lines += said("StepHeld", 0, [8] * HOSTS) + said("StepHeld", 0, held or [12] * HOSTS)
    lines += said("restored", 1, restored, sources={"memory": 7, "store": store})
    lines += said("checked", 1, restored, right=right) + said("step", 1, [step + 1 for step in restored])
    return [line for line in lines if line["event"] != but]


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
        (LOST, story([12] * 4, store=1, committed=12), ""),  # the store has nothing older
        (LOST, story([12] * 4, right=False), "wrong bits"),
        (LOST, story([12] * 4)[:-5] + story([12] * 4)[-4:], "wrong bits"),  # one was not compared
        (LOST, story([12] * 4, but="StepHeld"), "step None was there"),
        (OUTSIDE, story([4] * 4, store=1), ""),
        (OUTSIDE, story([8] * 4, store=1), ""),  # nobody was told that it is committed
        (OUTSIDE, story([0] * 4, store=1), "step 4 was there"),
        (OUTSIDE, story([4] * 4, right=False), "wrong bits"),
        (OUTSIDE, story([99] * 4), "nobody has trained"),
    ],
)
def test_what_came_back_is_judged_by_what_survivors_were_told(one: Round, lines: list[Line], problem: str) -> None:
    verdict = judge(one, lines, killed=0, back=1, killed_s=4.0)
    assert verdict.seconds == 6.0
    assert (problem in verdict.problems[0]) if problem else verdict.problems == []


def test_a_job_that_was_lost_twice_has_what_it_held_between() -> None:
    """Start 1 comes back on step 12, holds step 16, and is lost, too; start 2 is judged, to its last process."""
    lines = story([12] * 4) + said("StepHeld", 1, [16] * 4)
    for restored, problem in ((16, ""), (12, "step 16 was there")):
        back = said("restored", 2, [restored] * 4, sources={}) + said("checked", 2, [restored] * 4, right=True)
        steps = [{**line, "time": 20.0 + line["process"]} for line in said("step", 2, [restored + 1] * 4)]
        verdict = judge(LOST, lines + back + steps, killed=0, back=2, killed_s=4.0)
        assert verdict.seconds == 19.0
        assert (problem in verdict.problems[0]) if problem else verdict.problems == []


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({(0, 0): [8, 12], (0, 1): [8, 12, 16]}, 12),
        ({(0, 0): [12], (0, 1): [12], (1, 0): [16], (1, 1): [16]}, 16),
        ({(0, 0): [12, 16], (0, 1): [12], (1, 1): [16]}, 12),  # of different starts: no start had all of it
        ({(0, 0): [12]}, None),
        ({(2, 0): [12], (2, 1): [12]}, None),  # afterwards
    ],
)
def test_held_is_what_all_survivors_were_told_in_one_start(
    held: dict[tuple[int, int], list[int]], expected: int | None
) -> None:
    lines = [
        {"event": "StepHeld", "restart": restart, "process": host, "step": step}
        for (restart, host), steps in held.items()
        for step in steps
    ]
    assert held_by_all(lines, [0, 1], range(2)) == expected


@pytest.mark.parametrize(
    ("restored", "right", "arrays", "way", "problem"),
    [
        ({8}, [True, True], [0, 0], "memory", ""),
        ({12}, [True, True], [0, 0], "memory", ""),
        ({8}, [True, True], [7, 7], "store", ""),
        ({4}, [True, True], [0, 0], "memory", "expected step 8"),
        ({8, 12}, [True, True], [0, 0], "memory", "expected step 8"),
        ({8}, [True, False], [0, 0], "memory", "wrong bits"),
        ({8}, [True, True], [0, 7], "memory", "from the store"),
    ],
)
def test_a_restart_is_judged_by_step_bits_and_what_came_over_the_links(
    restored: set[int], right: list[bool], arrays: list[int], way: str, problem: str
) -> None:
    problems = restarts.judge(8, restored, right, arrays, way)
    assert (problem in problems[0]) if problem else problems == []


def test_a_bit_that_is_wrong_on_one_device_and_a_state_of_another_step_are_noticed() -> None:
    training, loader = job.Training({"mib": "0.25", "mesh": "4x2"}, restarted=False), job.Loader()
    training.compile()
    state = training.begin()
    for _ in range(2):
        state = training.step(state, loader.next())
    assert [training.is_right(state, step) for step in range(3)] == [False, True, False]
    damaged = np.array(state["w5"])
    damaged[-1, -1] ^= 1
    state["w5"] = jax.device_put(damaged, state["w5"].sharding)
    assert not training.is_right(state, 1)


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


def test_measurements_are_kept_from_run_to_run_but_for_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert lines.read(path) == [] and lines.keep([{"round": 1}], None) == [{"round": 1}]
    assert lines.keep([{"round": 1}], path) == [{"round": 1}]
    assert lines.keep([{"round": 2}], path) == [{"round": 1}, {"round": 2}]
    path.write_text(path.read_text() + '{"round": 3, "sec')
    assert lines.read(path) == [{"round": 1}, {"round": 2}]


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

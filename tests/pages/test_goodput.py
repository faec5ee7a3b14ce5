"""What the page says of goodput comes from the simulation, and the simulation is right where it can be calculated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.goodput import BEGIN, DAY_S, END, JOBS, Job, row, simulate

PAGE = Path(__file__).parents[2] / "docs" / "tiers.md"


def test_the_page_has_what_the_command_prints() -> None:
    assert row(JOBS[0]) in PAGE.read_text().split(BEGIN)[1].split(END)[0]


def test_time_is_all_accounted_for_and_goes_where_it_can_be_calculated_to_go() -> None:
    """Each failure costs half an interval of saves and the time until they are safe, twice trained, and a restart."""
    job = Job(1000, save_blocked_s=0.0)
    seconds = simulate(job, seed=1)
    assert sum(seconds.values()) == pytest.approx(job.days * DAY_S)
    failures = seconds["down"] / job.detect_s
    assert failures == pytest.approx(job.failures_per_s * job.days * DAY_S, rel=0.2)
    assert seconds["starting"] == pytest.approx(failures * (job.start_s + job.store_restore_s), rel=0.05)
    assert seconds["again"] == pytest.approx(failures * (job.save_every_s / 2 + job.save_safe_s), rel=0.15)


def test_held_steps_shorten_what_is_trained_again_and_only_what_they_survive() -> None:
    job = Job(1000, save_blocked_s=0.0)
    without, with_it = simulate(job, seed=1), simulate(replace(job, hold_every_s=100.0, also_lost=0.0), seed=1)
    beyond = simulate(replace(job, hold_every_s=100.0, also_lost=1.0), seed=1)
    assert with_it["again"] < without["again"] / 5 and with_it["starting"] < without["starting"] / 3
    assert beyond["again"] == pytest.approx(without["again"], rel=0.1)

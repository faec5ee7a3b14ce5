"""Which steps a job saves: the same on all hosts, on time, and again what has failed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import orchestrator as oc
from orchestrator.job.pacing import Pacing
from orchestrator.job.rendezvous import SingleProcess, connect
from orchestrator.job.schedule import PollSpacing, SaveSchedule
from orchestrator.observe.events import CadenceChosen, subscribe
from orchestrator.policy import SavePolicy
from tests.support.processes import job
from tests.support.runs import journal_of, now, state


class Clock:
    """Seconds, as far as they are let pass."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Said:
    """What process 0 has broadcast at which step, and the step at which SIGTERM comes."""

    sigterm_at: int | None = None
    answers: dict[int, Any] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return list(self.answers)


class Host:
    """The port of process `process` of a job whose processes are asked in order, process 0 first."""

    def __init__(self, process: int, said: Said) -> None:
        self.process, self.count, self.said = process, 2, said
        self.preemptions_asked: list[int] = []

    def broadcast(self, name: str, value: Any, timeout_s: float) -> Any:
        step = int(name.removeprefix("save step ").removesuffix("?"))
        if self.process == 0:
            assert value is not None
            self.said.answers[step] = value
        return self.said.answers[step]  # KeyError: this process asks where process 0 does not

    def preempted(self, step: int) -> bool:
        self.preemptions_asked.append(step)
        return self.said.sigterm_at is not None and step >= self.said.sigterm_at


class Job:
    """Two hosts with a schedule each, whose clocks differ and drift."""

    def __init__(self, policy: SavePolicy, sigterm_at: int | None = None) -> None:
        self.said = Said(sigterm_at)
        self.clocks = [Clock(1000.0), Clock(5.0)]
        self.ports: list[Any] = [Host(process, self.said) for process in range(2)]
        self.schedules = [
            SaveSchedule(policy, port, 1.0, clock) for port, clock in zip(self.ports, self.clocks, strict=True)
        ]

    def due(self, step: int) -> bool:
        answers = [schedule.due(step) for schedule in self.schedules]
        assert len(set(answers)) == 1, f"step {step}: the hosts do not agree"
        return answers[0]

    def save(self, step: int, *, fails: bool = False) -> None:
        for schedule, clock in zip(self.schedules, self.clocks, strict=True):
            schedule.begin(clock())
            schedule.started(step)
            schedule.committed(0.0, 0.0)
            if fails:
                schedule.failed(step)

    def run(self, steps: int, step_s: float = 1.0) -> list[int]:
        """Train; the steps that were saved."""
        saved = []
        for step in range(steps):
            if self.due(step):
                self.save(step)
                saved.append(step)
            self.clocks[0].seconds += step_s
            self.clocks[1].seconds += 3 * step_s
        return saved


class Row(NamedTuple):
    policy: SavePolicy
    saved: list[int]
    polled: list[int]
    sigterm_at: int | None = None


class OddSteps:
    """A policy of the user's own that says that it goes by time, and not for how long it is quiet."""

    timed = True

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return elapsed_s is None or step % 2 == 1


ROWS = {
    "by step": Row(oc.every(4) | oc.at([5]), [0, 4, 5, 8], []),
    "by step, then SIGTERM": Row(oc.every(4), [0, 4, 6, 7, 8, 9], [], sigterm_at=6),
    "nothing is due, then SIGTERM": Row(oc.at([99]), [8, 9], [], sigterm_at=8),
    # At first each step is asked about; with a save far away it is seldom.
    "by time": Row(oc.every_seconds(5), [0, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "by time or by step": Row(oc.every_seconds(100) | oc.at([5]), [0, 5], [0, 1, 2, 4, 8]),
    "by time, then SIGTERM": Row(oc.every_seconds(100), [0, 7, 8, 9], [0, 1, 2, 4, 8], sigterm_at=7),
    "continuously, of saves that take no time": Row(oc.continuous(), list(range(10)), list(range(10))),
    "continuously, but not more often": Row(oc.continuous(4), [0, 4, 8], list(range(10))),
    "of the user's own": Row(OddSteps(), [0, 1, 3, 5, 7, 9], list(range(10))),
}


@pytest.mark.parametrize("name", ROWS)
def test_all_hosts_save_the_steps_that_are_due_whatever_their_clocks_say(name: str) -> None:
    row = ROWS[name]
    running = Job(row.policy, row.sigterm_at)
    assert running.run(10) == row.saved
    assert running.said.steps == row.polled
    assert [schedule.preempted for schedule in running.schedules] == [row.sigterm_at is not None] * 2
    asked = list(range(10 if row.sigterm_at is None else row.sigterm_at + 1))  # whether the step is due or not
    assert [port.preemptions_asked for port in running.ports] == [asked] * 2


def test_process_0_is_polled_seldom_and_no_save_by_time_is_late() -> None:
    running = Job(oc.every_seconds(0.5) | oc.at([33]))
    saved = running.run(1500, step_s=0.01)
    assert 33 in saved, "what is due by step is not missed between two polls"
    gaps = [after - before for before, after in itertools.pairwise(saved)]
    assert len(saved) >= 25 and max(gaps) <= 52, saved  # 50 steps of 0.01 s, and what floats round
    assert len(running.said.steps) < 500, running.said.steps


def test_preemption_is_asked_about_once_a_step_and_not_again_once_it_is_known() -> None:
    running = Job(oc.every(2), sigterm_at=3)
    schedule, clock, port = running.schedules[0], running.clocks[0], running.ports[0]
    for step in range(6):
        clock.seconds = 100.0 + step
        assert schedule.reached_preemption(step) == (step >= 3)
        assert schedule.due(step) == (step % 2 == 0 or step >= 3)
    assert port.preemptions_asked == [0, 1, 2, 3]
    assert schedule.preempted and schedule.preempted_s == 103.0


def test_a_step_whose_save_failed_is_due_again_until_it_is_begun_again() -> None:
    schedule = Job(oc.every(1)).schedules[0]
    assert (schedule.saved_step, schedule.failed_step) == (None, None)
    rows = [
        (schedule.started, 1, (1, None)),
        (schedule.failed, 1, (None, 1)),
        (schedule.started, 2, (2, 1)),  # step 1 is still the one that has failed
        (schedule.failed, 2, (None, 2)),
        (schedule.started, 2, (2, None)),
    ]
    for number, (note, step, expected) in enumerate(rows):
        note(step)
        assert (schedule.saved_step, schedule.failed_step) == expected, f"row {number}"


def test_seconds_count_from_the_last_saves_beginning_whatever_became_of_it() -> None:
    running = Job(oc.every_seconds(10))
    assert running.due(0)
    running.save(0, fails=True)
    running.clocks[0].seconds += 9.9
    assert not running.due(1)
    running.clocks[0].seconds += 0.1
    assert running.due(2)


def test_the_next_poll_is_half_way_doubles_at_most_and_is_at_most_64_steps_away() -> None:
    clock = Clock()
    spacing = PollSpacing(clock)
    assert spacing.plan(0, 100.0) == 1  # how long a step takes is not known yet
    assert spacing.plan(1, 0.0) == 1  # due: the same question at the same step has the same answer
    step, strides = 2, []
    for _ in range(9):
        following = spacing.plan(step, 1e9)
        strides.append(following - step)
        step = following
    assert strides == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    clock.seconds += 64  # the last 64 steps took a second each
    assert spacing.plan(step, 8.0) == step + 4
    assert spacing.plan(step + 4, 0.0) == step + 4
    assert spacing.plan(step + 5, 1e9) == step + 6  # after a save: one by one again


# With an agent.


def test_an_agent_measures_chooses_and_says_why_once(root: Path) -> None:
    told: list[CadenceChosen] = []
    end = subscribe(lambda event: told.append(event) if isinstance(event, CadenceChosen) else None)
    try:
        for _ in range(3):
            with oc.Agent(root, save=oc.auto(max_loss_s=2000), options=now()) as agent:
                assert agent.cadence is None
                assert agent.save(len(journal_of(root)), state(0))
                assert not agent.save(99, state(0))  # not due yet: that the choice has been made is known now
                chosen = agent.cadence
                assert chosen is not None
                assert chosen.costs.blocked_s > 0 and chosen.costs.durable_s > 0
                assert chosen.interval_s < 2000
    finally:
        end()
    assert chosen.costs.interruptions == 2
    assert len(told) == 3 and "2 interruptions in" in told[-1].because
    fresh = Pacing(agent._store)
    assert fresh.costs is None  # of the saves; the history is there


@pytest.mark.slow
def test_all_hosts_save_the_same_steps_at_the_chosen_interval(tmp_path: Path) -> None:
    with job(2, 1, tmp_path / "run", tmp_path / "logs", steps=60, delay=0.05, auto=1.0, keep=99) as running:
        assert running.wait(90) == [0, 0], running.story()
        first, second = (running.said(process, "done")[0] for process in range(2))
        assert first["steps"] == second["steps"] and first["failures"] == 0
        # About 60 steps in 3 to 6 s, at least 0.5 s apart: neither each step nor only the first.
        assert 3 <= len(first["steps"]) <= 15, first["steps"]


class Counting:
    """The port of a job of one process, counting what it broadcasts."""

    def __init__(self) -> None:
        self.inner = connect(1.0)
        self.process, self.count, self.hosts = self.inner.process, self.inner.count, self.inner.hosts
        self.asked: list[int] = []

    def broadcast(self, name: str, value: Any, timeout_s: float) -> Any:
        if name.startswith("save step"):
            self.asked.append(int(name.removeprefix("save step ").removesuffix("?")))
        return self.inner.broadcast(name, value, timeout_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_users_own_timed_policy_is_polled_at_each_step(root: Path) -> None:
    class OddMinutes:
        timed = True

        def due(self, step: int, elapsed_s: float | None) -> bool:
            return elapsed_s is None

    rendezvous = Counting()
    with oc.Agent(root, save=OddMinutes(), rendezvous=rendezvous, options=now()) as agent:
        assert [agent.save(step, state(step)) for step in range(4)] == [True, False, False, False]
    assert rendezvous.asked == [0, 1, 2, 3]


def test_a_continuous_policy_wants_no_save_while_one_is_in_flight() -> None:
    schedule = SaveSchedule(oc.continuous() | oc.at([7]), SingleProcess(), 1.0, clock=lambda: 0.0)
    due = []
    for step in range(10):
        due.append(schedule.due(step))
        if step in (0, 5):
            schedule.begin(0.0)
            schedule.started(step)
        if step == 2:
            schedule.committed(0.0, 0.0)
        if step == 8:
            schedule.failed(5)
    assert [step for step, answer in enumerate(due) if answer] == [0, 3, 4, 5, 7, 9]

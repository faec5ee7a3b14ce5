"""An agent that holds steps in memory beside its saves: what comes back from there, and what does not."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator import environment, failpoints
from orchestrator.errors import StepNotFound, UsageError
from orchestrator.observe import events
from orchestrator.rules import journal
from tests.support.damage import flip, truncate
from tests.support.runs import LIKE, now, state, store_of
from tests.support.tiers import agent, crash, crashed_at_14, held_dir, train

TIER_EVENTS = (events.StepHeld, events.StepNotHeld, events.HeldStepDropped)


@pytest.fixture
def seen() -> Iterator[list[Any]]:
    found: list[Any] = []
    stop = events.subscribe(lambda event: found.append(event) if isinstance(event, TIER_EVENTS) else None)
    yield found
    stop()


def held_steps(root: Path) -> list[int]:
    return sorted(int(path.name) for path in (held_dir(root) / "steps").iterdir())


def came_back(root: Path, **asked: Any) -> tuple[int, set[str]]:
    with agent(root) as running:
        restored = running.restore(LIKE, **asked)
        crash(running)
    assert restored is not None
    step = restored.step
    assert jnp.array_equal(restored.state["w"], state(step)["w"]) and restored.state["count"] == step
    assert restored.process_states == {0: f"at {step}".encode()} and restored.extra["at"] == step
    return step, set(restored.sources)


@pytest.fixture
def crashed(root: Path) -> Path:
    """Steps 0 and 10 are saved; 12 and 14 are held."""
    return crashed_at_14(root)


def test_a_job_comes_back_on_the_newest_held_step_without_the_stores_arrays(crashed: Path, seen: list[Any]) -> None:
    for data in (crashed / "steps").glob("*/*/state"):
        shutil.rmtree(data)  # nothing is read from them
    assert came_back(crashed) == (14, {"memory"})
    assert came_back(crashed) == (14, {"memory"})  # and again: a restore holds nothing new and frees nothing
    assert held_steps(crashed) == [12, 14] and not seen


def test_what_the_store_has_is_taken_if_it_is_newer_and_if_nothing_is_held(crashed: Path) -> None:
    running = agent(crashed, save=1)
    assert running.restore(LIKE)
    train(running, 15)
    crash(running)
    assert came_back(crashed) == (15, {"store"})
    shutil.rmtree(crashed.parent / "tier")
    assert came_back(crashed) == (15, {"store"})


def test_a_step_that_was_asked_for_is_the_journals_or_else_a_held_one(crashed: Path) -> None:
    assert came_back(crashed, step=10) == (10, {"store"})
    assert came_back(crashed, step=12) == (12, {"memory"})
    with agent(crashed) as running, pytest.raises(StepNotFound):
        running.restore(LIKE, step=13)


@pytest.mark.parametrize(
    ("spoiled", "asked", "source"),
    [(0, None, "memory"), (0, 10, "store"), (0, 12, "memory"), (0, 14, "memory"), (0, 13, ""), (12, 12, "")],
)
def test_a_reader_with_the_jobs_tiers_finds_what_the_job_does(
    spoiled: int, asked: int | None, source: str, crashed: Path, seen: list[Any]
) -> None:
    if spoiled:
        flip(data_file(crashed, spoiled))
    reader = oc.open_run(crashed, tiers=[oc.memory(directory=crashed.parent / "tier")])
    if not source:
        with agent(crashed) as running, pytest.raises(StepNotFound):
            running.restore(LIKE, step=asked)
        with pytest.raises(StepNotFound):
            reader.restore(LIKE, step=asked)
        assert [event.step for event in seen] == [spoiled] * 2 if spoiled else not seen
        return
    restored = reader.restore(LIKE, step=asked)
    assert (restored.step, set(restored.sources)) == (asked or 14, {source})
    assert came_back(crashed, step=asked) == (asked or 14, {source})
    if source == "memory" and asked:
        with pytest.raises(StepNotFound):
            oc.open_run(crashed).restore(LIKE, step=asked)


def test_of_a_step_that_was_held_before_and_is_saved_now_a_reader_takes_the_saved_one(crashed: Path) -> None:
    with oc.Agent(crashed, options=now()) as without_tiers:
        without_tiers.restore(LIKE, step=10)
        assert without_tiers.save(12, state(12))
    reader = oc.open_run(crashed, tiers=[oc.memory(directory=crashed.parent / "tier")])
    assert set(reader.restore(LIKE, step=12).sources) == {"store"}


def data_file(crashed: Path, step: int) -> Path:
    (found,) = (held_dir(crashed) / f"steps/{step:08d}").glob("*/state/ocdbt.process_0/d/*")
    return found


def swap(path: Path) -> None:
    """Another step's file of the same size."""
    other = next(other for other in path.parents[5].glob("*/*/state/ocdbt.process_0/d/*") if other != path)
    path.write_bytes(other.read_bytes())


def to_link(path: Path) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept)


@pytest.mark.parametrize(
    ("what", "spoil", "named"),
    [
        ("data", flip, "ocdbt.process_0"),
        ("data", truncate, "ocdbt.process_0"),
        ("data", swap, "chunk w/c/0"),
        ("data", to_link, "symbolic link"),
        ("data", Path.unlink, "is missing"),
        ("manifest.json", flip, "manifest.json"),
        ("manifest.json", Path.unlink, "manifest.json"),
        ("intent.json", flip, "intent.json"),
        ("receipts/00000.json", Path.unlink, "receipts/00000.json"),
        ("process/00000.bin", flip, "process/00000.bin"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_the_next_source_is_taken(
    what: str, spoil: Any, named: str, crashed: Path, seen: list[Any]
) -> None:
    path = data_file(crashed, 14)
    spoil(path if what == "data" else path.parents[3] / what)
    assert came_back(crashed) == (12, {"memory"})
    (dropped,) = seen
    assert (dropped.step, type(dropped)) == (14, events.HeldStepDropped) and named in dropped.reason
    flip(data_file(crashed, 12))
    assert came_back(crashed) == (10, {"store"})
    assert all(live.restorable for live in store_of(crashed).require_head().live)  # nothing of it is journalled


def test_another_run_at_the_same_root_does_not_see_what_the_first_one_held(crashed: Path) -> None:
    crashed.rename(crashed.with_name("old"))
    with agent(crashed) as running:
        assert running.restore(LIKE) is None
        train(running, 0)
    assert came_back(crashed) == (0, {"store"})  # the first run's step 14 is of the same epoch, and newer


def test_what_somebody_has_quarantined_bars_what_was_held_after_it(crashed: Path) -> None:
    bad = journal.find(store_of(crashed).require_head(), 10)
    assert bad
    store_of(crashed).append(
        lambda head, stamp: journal.quarantine(head, stamp, attempt=bad.id, reason="NaN", by_hand=True)
    )
    assert came_back(crashed) == (0, {"store"})


@pytest.mark.parametrize(("back", "step"), [("1", 10), ("2", 0)])
def test_a_supervisor_that_steps_back_leaves_memory_out_first(
    back: str, step: int, crashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STEP_BACK", back)
    assert came_back(crashed) == (step, {"store"})


def test_a_target_that_does_not_fit_is_the_users_to_fix_wherever_the_step_is(crashed: Path) -> None:
    with agent(crashed) as running, pytest.raises(oc.Mismatch):
        running.restore({**LIKE, "w": jnp.zeros(3)})
    assert came_back(crashed) == (14, {"memory"})


def test_held_steps_are_counted_and_freed_and_a_clean_end_frees_what_the_store_has(root: Path) -> None:
    deleted: list[Any] = []
    stop = events.subscribe(lambda event: deleted.append(event) if isinstance(event, events.AttemptsDeleted) else None)
    running = agent(root, keep=3)
    running.restore(LIKE)
    train(running, *range(11))
    running._holding._freeing.wait(10)
    assert held_steps(root) == [6, 8, 10]
    running.close()
    stop()
    assert deleted == []  # of the run's steps, which is what is counted
    assert not (held_dir(root) / "steps").exists() or held_steps(root) == []


def test_a_clean_end_keeps_what_is_newer_than_the_store(crashed: Path) -> None:
    with agent(crashed) as running:
        running.restore(LIKE)
    assert came_back(crashed) == (14, {"memory"})


def test_a_step_for_which_there_is_no_room_is_not_held_and_saves_go_on(root: Path, seen: list[Any]) -> None:
    running = agent(root, bytes_max=1000, save=4)
    running.restore(LIKE)
    train(running, *range(5))
    assert [(type(event), event.step) for event in seen] == [(events.StepNotHeld, step) for step in (0, 2, 4)]
    assert "no room in memory on " in seen[0].reason and "of the 1000 of bytes_max" in seen[0].reason
    assert running.all_steps() == [0, 4] and running.failures == 0
    assert not list(held_dir(root).glob("steps/*/*/state"))
    running.close()


def test_training_never_waits_for_memory_and_a_failure_there_is_no_failed_save(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=delay:3@step=2;save.write=error@step=6")
    with agent(root) as running:
        running.restore(LIKE)
        started = time.monotonic()
        assert not running.save(2, state(2)) and not running.save(4, state(4))  # neither goes to the store
        assert time.monotonic() - started < 3
        running._holding.settle()
        train(running, 6, 8)
        assert [(type(event), event.step) for event in seen] == [
            (events.StepNotHeld, 4),
            (events.StepHeld, 2),
            (events.StepNotHeld, 6),
            (events.StepHeld, 8),
        ]
        assert "step 2 is not held yet" in seen[0].reason and running.failures == 0
    assert held_steps(root) == [2, 8]


PLACES = (
    *("save.stage", "save.write", "save.seal", "intent.before", "intent.after", "receipt.write", "receipt.after"),
    *("finalize.before", "finalize.merged", "manifest.before", "manifest.after", "commit.before", "commit.after"),
)


def test_wherever_a_held_step_fails_the_next_one_is_held_and_a_whole_one_comes_back(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = dict(enumerate(PLACES, 1))
    rules = [f"{place}=error@step={2 * step}" for step, place in faults.items()]
    monkeypatch.setenv(environment.FAILPOINTS, ";".join(rules))
    running = agent(root, every=1, save=1000)
    running.restore(LIKE)
    for step in faults:
        train(running, 2 * step, 2 * step + 1)
        last = seen[-1]
        assert isinstance(last, events.StepHeld) and last.step == 2 * step + 1, faults[step]
        assert isinstance(seen[-2], events.StepNotHeld) and seen[-2].step == 2 * step, faults[step]
    assert running.failures == 0
    train(running, 50)
    monkeypatch.setenv(environment.FAILPOINTS, "commit.after=error@step=51")
    failpoints.configure(os.environ, 0)
    train(running, 51)  # in the log: what this process says of it is wrong, and what it has written stays
    assert isinstance(seen[-1], events.StepNotHeld)
    crash(running)
    monkeypatch.delenv(environment.FAILPOINTS)
    assert came_back(root) == (51, {"memory"})
    assert not any(isinstance(event, events.HeldStepDropped) for event in seen)


def test_a_tier_that_is_gone_costs_held_steps_and_nothing_else(root: Path, seen: list[Any]) -> None:
    running = agent(root, save=4)
    running.restore(LIKE)
    train(running, 0, 1, 2)
    shutil.rmtree(root.parent / "tier")
    train(running, *range(3, 9))
    assert [(type(event), event.step) for event in seen[-3:]] == [(events.StepNotHeld, step) for step in (4, 6, 8)]
    assert running.all_steps() == [0, 4, 8] and running.failures == 0
    running.close()
    assert came_back(root) == (8, {"store"})


def test_where_the_tier_cannot_be_the_agent_says_so_and_saves(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        contextlib.closing(
            oc.Agent(root, tiers=[oc.memory(every=1, directory=root.parent / "no-such-disk")])
        ) as running,
    ):
        assert running.restore(LIKE) is None
        train(running, 0, 1)
        assert running.all_steps() == [0, 1]
    assert "no steps are held in memory, saves to the store go on" in caplog.text and "no-such-disk" in caplog.text


def test_a_held_step_is_due_as_a_save_is_and_wrong_arguments_are_the_users(root: Path, seen: list[Any]) -> None:
    with agent(root) as running:
        running.restore(LIKE)
        assert [step for step in range(1, 11) if running.should_save(step)] == [2, 4, 6, 8, 10]
        with pytest.raises(UsageError, match="metrics"):
            running.save(2, state(2), metrics={"loss": "low"})  # type: ignore[dict-item]
        told = [event for event in seen if event.step == 2]  # as the other processes are, who would wait
        assert told and all("UsageError" in event.reason or "takes no part" in event.reason for event in told)
        assert not running.save(3, state(3)) and not running.save(4, state(4)), "no save to the store has started"
        running._holding.settle()
        assert running.all_steps() == [] and [event.step for event in seen if isinstance(event, events.StepHeld)] == [4]


@pytest.mark.parametrize(
    "options", [{"compression": True}, {"attest": "full"}, {"host_bytes_max": 1000}, {"chunks": "tiles"}]
)
def test_however_a_job_saves_it_holds_and_comes_back(options: dict[str, Any], root: Path, seen: list[Any]) -> None:
    (root.parent / "tier").mkdir()

    def start() -> oc.Agent:
        tiers = [oc.memory(every=1, directory=root.parent / "tier")]
        return oc.Agent(root, save=oc.every(10), tiers=tiers, options=oc.Options(**options))

    running = start()
    running.restore(LIKE)
    train(running, 0, 1, 2)
    crash(running)
    running = start()
    restored = running.restore(LIKE)
    crash(running)
    assert restored and restored.step == 2 and set(restored.sources) == {"memory"}
    assert jnp.array_equal(restored.state["w"], state(2)["w"])
    assert {type(event) for event in seen} == {events.StepHeld}


def test_a_reader_takes_a_held_step_if_it_is_told_where(crashed: Path, seen: list[Any]) -> None:
    assert oc.open_run(crashed).restore(LIKE).step == 10
    tiers = [oc.memory(directory=crashed.parent / "tier")]
    restored = oc.open_run(crashed, tiers=tiers).restore(LIKE)
    assert (restored.step, set(restored.sources)) == (14, {"memory"}) and restored.process_states == {0: b"at 14"}
    assert oc.open_run(crashed, tiers=tiers).restore(LIKE, step=10).step == 10
    flip(data_file(crashed, 14))
    assert oc.open_run(crashed, tiers=tiers).restore(LIKE).step == 12 and [event.step for event in seen] == [14]
    assert oc.open_run(crashed, tiers=[oc.memory(directory=crashed.parent)]).restore(LIKE).step == 10


def test_a_job_without_tiers_reads_and_writes_no_tier(crashed: Path) -> None:
    with oc.Agent(crashed) as running:
        restored = running.restore(LIKE)
        assert restored and restored.step == 10 and set(restored.sources) == {"store"}

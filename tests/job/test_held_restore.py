"""Coming back from memory with a process that finds something else: all take one step, the newest that all can have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.observe import events
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run.tier import OwnTier
from tests.support.peers import OfTwo, same
from tests.support.runs import LIKE, kinds, store_of
from tests.support.snapshots import snapshot
from tests.support.tiers import crashed_at_14

OPTIONS = RestoreOptions(timeout_s=1.0)
Theirs = Callable[[str, Any], Any]


@pytest.fixture
def crashed(root: Path) -> Path:
    return crashed_at_14(root)


@pytest.fixture
def dropped() -> Iterator[list[events.HeldStepDropped]]:
    found: list[events.HeldStepDropped] = []
    stop = events.subscribe(lambda event: found.append(event) if isinstance(event, events.HeldStepDropped) else None)
    yield found
    stop()


def tier_of(root: Path) -> MemoryTier:
    return oc.memory(directory=root.parent / "tier")


def reports(round_: str, kind: str) -> Theirs:
    claim = {"type": "failure", "kind": kind, "text": "w is wrong"}
    return lambda name, value: claim if name == round_ else value


@pytest.mark.parametrize(
    ("theirs", "step", "source", "reason"),
    [
        (same, 14, "memory", None),
        (reports("restore: step 14 fits", "Damaged"), 12, "memory", "process 1 (host-1): w is wrong"),
        (reports("restore: step 14", "Damaged"), 12, "memory", "process 1 (host-1): w is wrong"),
        (reports("restore: step 14", "Unavailable"), 12, "memory", "process 1 (host-1): w is wrong"),
    ],
)
def test_all_processes_take_the_newest_step_that_all_can_read(
    theirs: Theirs, step: int, source: str, reason: str | None, crashed: Path, dropped: list[events.HeldStepDropped]
) -> None:
    before = kinds(crashed)
    job = OfTwo(theirs)
    restored = restore_together(store_of(crashed), job, LIKE, OPTIONS, None, tier_of(crashed))
    assert restored and (restored.step, set(restored.sources)) == (step, {source})
    assert {event.reason for event in dropped} == ({reason} if reason else set())
    assert kinds(crashed) == before + (["restored"] if source == "store" else [])  # nothing else is journalled


def test_a_run_whose_first_entry_is_gone_comes_back_from_the_store(
    crashed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    min((crashed / "journal").iterdir()).unlink()
    with caplog.at_level(logging.WARNING):
        restored = restore_together(store_of(crashed), OfTwo(same), LIKE, OPTIONS, None, tier_of(crashed))
    assert restored and (restored.step, set(restored.sources)) == (10, {"store"})
    assert oc.open_run(crashed, tiers=[tier_of(crashed)]).restore(LIKE).step == 10
    assert "no held step is looked for" in caplog.text


def test_a_target_that_does_not_fit_on_another_host_is_raised_on_all(crashed: Path) -> None:
    before = snapshot(crashed)
    with pytest.raises(oc.OrchestratorError, match="process 1: Mismatch: w is wrong"):
        job = OfTwo(reports("restore: step 14 fits", "Mismatch"))
        restore_together(store_of(crashed), job, LIKE, OPTIONS, None, tier_of(crashed))
    assert snapshot(crashed) == before


@pytest.mark.parametrize(("stale", "reason"), [(False, "ENOENT"), (True, "another one of that name is there")])
def test_where_a_process_cannot_reach_anothers_tier_nothing_is_held_and_that_is_said(
    stale: bool, reason: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root.parent / "tier").mkdir()

    def elsewhere(name: str, value: Any) -> Any:
        if name != "memory tier: open":
            return value
        path = value["path"].replace("process-00000", "process-00001")
        if stale:  # process 1 was on this machine once
            OwnTier(path, "test").open_epoch(1, 0)
        return {**value, "path": path}

    with caplog.at_level(logging.WARNING):
        job = OfTwo(elsewhere)
        running = oc.Agent(root, tiers=[tier_of(root)], rendezvous=job)
        assert running.restore(LIKE) is None
        assert not running._holding.due(0)
        running.finish()
    assert (
        "no steps are held in memory, saves to the store go on: process 0 (host-0) cannot reach the tier of process 1"
        in caplog.text
    )
    assert reason in caplog.text

"""Held steps of a run that was copied, or set back to a backup: versions, epochs and steps count on with the same
numbers there, and what one history holds is nothing to come back on in the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator import environment
from orchestrator.cli.held import HeldHere
from orchestrator.observe import events
from orchestrator.run.prefetch import Here, Prefetch
from tests.support.runs import LIKE, store_of
from tests.support.tiers import agent, crash, crashed_at_14, train


@pytest.fixture
def seen() -> Iterator[list[Any]]:
    found: list[Any] = []
    kinds = (events.StepNotHeld, events.HeldStepDropped)
    stop = events.subscribe(lambda event: found.append(event) if isinstance(event, kinds) else None)
    yield found
    stop()


def start(root: Path, *steps: int) -> int:
    """A start of the job that comes back, trains these steps, and crashes. Returns the step that it came back on."""
    with agent(root) as running:
        restored = running.restore(LIKE)
        train(running, *steps)
        crash(running)
    assert restored is not None
    return restored.step


def test_a_copy_of_a_run_and_the_run_hold_and_come_back_each_by_itself(root: Path, seen: list[Any]) -> None:
    crashed_at_14(root)
    copy = Path(shutil.copytree(root, root.with_name("copy")))
    assert start(root, 15, 16, 17, 18) == 14
    assert start(copy, 11, 12, 13) == 10, "14 is held by the run that it is a copy of"
    assert (start(root, 19), start(copy)) == (18, 12)
    assert not seen


def test_a_run_that_is_found_by_another_path_is_the_same_run(root: Path) -> None:
    crashed_at_14(root)
    (link := root.with_name("link")).symlink_to(root)
    assert start(link) == 14


@pytest.mark.parametrize("starts_since", [1, 2, 3])
def test_a_run_that_was_set_back_to_a_backup_never_comes_back_on_what_it_held_since(
    starts_since: int, root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed_at_14(root)
    backup = Path(shutil.copytree(root, root.with_name("backup")))
    for number in range(starts_since):
        start(root, 15 + 2 * number, 16 + 2 * number)
    shutil.rmtree(root)
    shutil.copytree(backup, root)
    newest = 14 + 2 * starts_since
    monkeypatch.setenv(environment.TIER_DIR, str(root.parent / "tier"))
    for _ in range(starts_since + 1):
        assert start(root, 11) in (10, 12, 14), f"{newest} is of the time after the backup"
        restored = oc.open_run(root, tiers=[oc.memory(directory=root.parent / "tier")]).restore(LIKE)
        assert restored.step in (10, 12, 14)
        taken = HeldHere(store_of(root)).choose(None)
        assert taken is None or taken.stored.live.step in (10, 12, 14)
        fetched = Prefetch(store_of(root), lambda run: Here(str(root.parent / "tier"), 0, 1)).run()
        assert fetched.step in (10, 12, 14), "what a restore does not take need not be fetched"
        by_step = {one.step: one.problem for one in HeldHere(store_of(root)).now(store_of(root).require_head())}
        assert not (newest in by_step and by_step[newest] == "")
    assert {event.step for event in seen if isinstance(event, events.HeldStepDropped)} >= {newest}
    assert start(root, 12) in (10, 12, 14)
    assert start(root, 15, 16) <= 14 and start(root) == 16, "an epoch that is new to the tier can hold again"

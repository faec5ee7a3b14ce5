"""A process that can have no more threads (a container's limit of pids) cannot save; its training goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.errors import SaveFailed
from orchestrator.observe import events
from orchestrator.run.tier_room import Room
from tests.support.runs import LIKE, state, store_of
from tests.support.tiers import crash

TOO_MUCH = 1 << 46  # of address space, for a stack


@contextlib.contextmanager
def no_more_threads() -> Iterator[None]:
    before = threading.stack_size(TOO_MUCH)
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            threading.Thread(target=int).start()
        yield
    finally:
        threading.stack_size(before)


@pytest.mark.parametrize("held", ["", "each step", "each step that is saved"])
def test_a_step_for_which_there_is_no_thread_is_a_failed_save_and_the_next_is_saved(held: str, root: Path) -> None:
    (tier := root.parent / "tier").mkdir()
    tiers = [oc.memory(every=2 if held.endswith("saved") else 1, directory=tier)] if held else []
    seen: list[Any] = []
    stop = events.subscribe(lambda event: seen.append(event) if isinstance(event, events.SaveNotCommitted) else None)
    agent = oc.Agent(root, save=oc.every(2), tiers=tiers)
    agent.restore(LIKE)
    agent.save(0, state(0))
    agent.wait_until_finished()
    with no_more_threads():
        for step in range(1, 6):
            assert not agent.save(step, state(step))
    assert agent.failures == 2
    if held:
        room = Room(str(next((tier / f"orchestrator-{os.getuid()}").iterdir())))
        assert not room.look().coming.total(), "no room is kept for what is not written"
    assert {event.step for event in seen} == {2, 4} and "can't start new thread" in seen[0].reason
    assert agent.save(6, state(6))
    crash(agent)
    stop()
    restored = oc.open_run(root).restore(LIKE)
    assert restored.step == 6 and [live.step for live in store_of(root).require_head().live] == [0, 6]


def test_where_failed_saves_are_to_be_raised_it_is_one(root: Path) -> None:
    with oc.Agent(root, options=oc.Options(on_save_failure="raise")) as agent:
        agent.save(0, state(0))
        agent.wait_until_finished()
        with no_more_threads(), pytest.raises(SaveFailed, match="can't start new thread"):
            agent.save(1, state(1))
        assert agent.save(2, state(2))

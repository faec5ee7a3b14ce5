"""Two agents of one process on one root: the newer one waits for the older one's save, takes over, and says so."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.storage import PosixStorage
from tests.support.fakes import HookedStorage, another_host
from tests.support.gcs import new_root
from tests.support.runs import LIKE, fill, kinds, now, state


def link(root: Path) -> Any:
    other = root.with_name("link")
    other.symlink_to(root)
    return other


SPELLINGS: dict[str, Callable[[Path], Any]] = {
    "the same": lambda root: root,
    "a slash": lambda root: f"{root}/",
    "file": lambda root: f"file://{root}",
    "relative": lambda root: os.path.relpath(root),
    "a link": link,
    "roundabout": lambda root: root / ".." / root.name,
}


class Slow:
    """A store whose receipts wait for `go`."""

    def __init__(self, root: Path) -> None:
        self.go, self.reached = threading.Event(), threading.Event()
        self.storage = HookedStorage(PosixStorage(str(root)), before=self._wait)

    def _wait(self, operation: str, key: str) -> None:
        if operation == "create" and "receipts/" in key:
            self.reached.set()
            assert self.go.wait(20)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_cell_that_is_run_again_loses_nothing_and_the_older_agent_says_what_happened(
    root: Path, spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(root)
    older = oc.Agent(root, storage=slow.storage)
    assert older.save(1, state(1)) and slow.reached.wait(20)
    threading.Timer(0.3, slow.go.set).start()
    with caplog.at_level(logging.WARNING), oc.Agent(SPELLINGS[spelling](root), options=now()) as newer:
        assert newer.latest_step() == 1  # making it has waited
        restored = newer.restore(LIKE)
        assert restored is not None and restored.step == 1
        assert newer.save(2, state(2))
        with pytest.raises(oc.UsageError, match=r"save: .* closed when a newer agent of this process took over"):
            older.save(3, state(3))
        older.wait_until_finished()
        older.close()
    assert kinds(root) == ["opened-epoch", "committed", "opened-epoch", "restored", "committed"]
    assert "is saving step 1 there: waiting for it" in caplog.text
    assert caplog.text.count("takes over from another agent of this process, which is closed") == 1


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_cell_that_is_run_again_on_a_bucket_loses_nothing(
    end: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_FAILPOINTS", "save.write=delay:0.5@step=1")
    url = new_root()
    older = oc.Agent(url, options=oc.Options(events_dir=""))
    assert older.save(1, state(1))
    with caplog.at_level(logging.WARNING), oc.Agent(url + end, options=now(events_dir="")) as newer:
        restored = newer.restore(LIKE)
        assert restored is not None and restored.step == 1 and newer.save(2, state(2))
        with pytest.raises(oc.UsageError, match="closed when a newer agent of this process took over"):
            older.save(3, state(3))
    assert oc.open_run(url).all_steps() == [1, 2]
    assert "is saving step 1 there: waiting for it" in caplog.text and "takes over" in caplog.text


def test_an_agent_that_the_program_has_dropped_is_waited_for_as_well(root: Path) -> None:
    slow = Slow(root)
    agent = oc.Agent(root, storage=slow.storage)
    assert agent.save(1, state(1)) and slow.reached.wait(20)
    threading.Timer(0.3, slow.go.set).start()
    agent = oc.Agent(root, options=now())  # the name is bound anew, as in a cell
    gc.collect()
    assert agent.save(2, state(2)) and agent.all_steps() == [1, 2]
    agent.close()


def test_agents_take_turns_however_often_the_cell_is_run(root: Path) -> None:
    agents = []
    for step in range(4):
        agents.append(oc.Agent(root))
        assert agents[-1].save(step, state(step))
    agents[-1].close()
    assert oc.open_run(root).all_steps() == [0, 1, 2, 3] and agents[-1].epoch == 4


@pytest.mark.parametrize(
    "rejected",
    [
        lambda agent: agent.save(2, {"other": jnp.zeros(2)}),
        lambda agent: agent.restore({"other": jnp.zeros(2)}),
        lambda agent: agent.restore(LIKE, step=9),
        lambda agent: agent.latest_step(),
    ],
)
def test_who_is_rejected_or_only_asks_takes_over_from_nobody(root: Path, rejected: Callable[[oc.Agent], Any]) -> None:
    with oc.Agent(root, options=now()) as older, oc.Agent(root, options=now()) as newer:
        older.save(1, state(1))
        with contextlib.suppress(oc.OrchestratorError):
            rejected(newer)
        assert older.save(2, state(2)) and older.epoch == 1 and newer.epoch is None


@pytest.mark.parametrize("place", ["another root", "another process"])
def test_agents_of_other_places_and_processes_are_left_alone(root: Path, place: str) -> None:
    with oc.Agent(root, options=now()) as older:
        older.save(1, state(1))
        where, me = (root / "more", None) if place == "another root" else (root, another_host())
        with oc.Agent(where, options=now(), rendezvous=me) as newer:
            newer.save(2, state(2))
        if place == "another root":
            assert older.save(3, state(3))
        else:
            with pytest.raises(oc.Fenced):
                older.save(3, state(3))
            with pytest.raises(oc.Fenced):
                older.close()


def test_a_save_that_hangs_is_waited_for_no_longer_than_its_own_bound(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.job.save_sequence.GRACE_S", 0.1)
    slow = Slow(root)
    older = oc.Agent(root, storage=slow.storage, options=oc.Options(save_timeout_s=0.5))
    assert older.save(1, state(1)) and slow.reached.wait(20)
    with oc.Agent(root, options=now()) as newer:
        assert newer.save(2, state(2)) and newer.all_steps() == [2]
    assert "did not end within" in caplog.text
    slow.go.set()
    del older


def test_one_that_was_closed_by_ctrl_c_while_it_saved_is_waited_for_too(root: Path) -> None:
    slow = Slow(root)
    older = oc.Agent(root, storage=slow.storage)
    assert older.save(1, state(1)) and slow.reached.wait(20)
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        older.close()
    assert older.in_flight == 1
    threading.Timer(0.3, slow.go.set).start()
    with oc.Agent(root, options=now()) as newer:
        assert newer.all_steps() == [1] and newer.save(2, state(2))
    older.close()


def test_a_manager_made_again_on_its_directory_knows_the_step_that_was_in_flight(root: Path) -> None:
    fill(root, 0)
    slow = Slow(root)
    manager = compat.CheckpointManager(root)
    older = oc.Agent(root, storage=slow.storage)
    assert older.save(1, state(1)) and slow.reached.wait(20)
    threading.Timer(0.3, slow.go.set).start()
    manager = compat.CheckpointManager(root)
    assert manager.latest_step() == 1
    assert manager.save(2, args=ocp.args.StandardSave(state(2)))
    manager.close()
    assert oc.open_run(root).all_steps() == [0, 1, 2]

"""Failpoints, the heartbeat file and the supervisor's wish to step back: what the environment asks of an agent."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator import environment, failpoints
from orchestrator.errors import StorageError, UsageError
from tests.support.runs import LIKE, fill, state


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    failpoints.configure({}, 0)


def set_up(text: str, process: int = 0, **environ: str) -> None:
    failpoints.configure({environment.FAILPOINTS: text, **environ}, process)


def hits(place: str, times: int) -> list[bool]:
    """Which of so many visits fail."""
    failed = []
    for _ in range(times):
        try:
            failpoints.hit(place)
        except StorageError:
            failed.append(True)
        else:
            failed.append(False)
    return failed


def test_unset_nothing_happens() -> None:
    set_up("")
    assert hits("commit.before", 3) == [False] * 3


def test_a_rule_holds_at_its_place_and_nowhere_else() -> None:
    set_up("commit.before=error")
    assert hits("commit.before", 2) == [True, True]
    assert hits("commit.after", 2) == [False, False]


def test_nth_counts_only_visits_at_which_the_other_conditions_hold() -> None:
    set_up("save.write=error@step=4@nth=2")
    failpoints.note(step=3)
    assert hits("save.write", 2) == [False, False]
    failpoints.note(step=4)
    assert hits("save.write", 3) == [False, True, False]


@pytest.mark.parametrize(("condition", "holds"), [("process=1", True), ("process=0", False), ("restart=2", True)])
def test_conditions_on_the_process_and_the_restart(condition: str, holds: bool) -> None:
    set_up(f"save.write=error@{condition}", process=1, ORCHESTRATOR_RESTART_COUNT="2")
    assert hits("save.write", 1) == [holds]


@pytest.mark.parametrize(
    ("action", "kind", "number"),
    [("enospc", OSError, errno.ENOSPC), ("eio", OSError, errno.EIO), ("short", OSError, errno.ENOSPC)],
)
def test_actions_raise_what_a_system_call_would(action: str, kind: type[OSError], number: int) -> None:
    set_up(f"storage.write={action}")
    halves: list[str] = []
    with pytest.raises(kind) as caught:
        failpoints.hit("storage.write", half=lambda: halves.append("half"))
    assert caught.value.errno == number
    assert halves == (["half"] if action == "short" else [])


def test_memory_and_delay() -> None:
    set_up("save.stage=memory;save.write=delay:0.05")
    with pytest.raises(MemoryError):
        failpoints.hit("save.stage")
    started = time.monotonic()
    failpoints.hit("save.write")
    assert time.monotonic() - started >= 0.05


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nowhere=kill", "no place 'nowhere'"),
        ("commit.before=explode", "no action 'explode'"),
        ("commit.before=kill@moon=1", "no condition 'moon'"),
        ("commit.before=kill@step=x", "invalid literal"),
        ("commit.before=delay:soon", "could not convert"),
    ],
)
def test_a_rule_that_cannot_be_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        failpoints.parse(text)


def test_an_agents_failed_save_is_provoked_by_the_environment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.FAILPOINTS, "save.stage=memory@step=1")
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        agent.save(1, state(1))
        assert agent.failures == 1
        agent.save(2, state(2))
        assert agent.all_steps() == [2]


def test_the_heartbeat_says_what_the_main_thread_does_and_at_which_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "heartbeat"
    monkeypatch.setenv(environment.HEARTBEAT_FILE, str(file))
    with oc.Agent(root) as agent:
        assert json.loads(file.read_text())["doing"] == "opened"
        agent.should_save(7)
        assert json.loads(file.read_text()) | {"doing": "training", "step": 7} == json.loads(file.read_text())


def test_a_heartbeat_that_cannot_be_written_does_not_hurt(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.HEARTBEAT_FILE, "/nowhere/at/all")
    with oc.Agent(root) as agent:
        assert agent.save(1, state(1))


@pytest.mark.parametrize(("back", "step"), [("1", 2), ("2", 1)])
def test_a_supervisor_may_ask_to_leave_out_the_newest_steps(
    root: Path, monkeypatch: pytest.MonkeyPatch, back: str, step: int
) -> None:
    fill(root, 1, 2, 3)
    monkeypatch.setenv(environment.STEP_BACK, back)
    with oc.Agent(root) as agent:
        restored = agent.restore(LIKE)
        assert restored is not None and restored.step == step


def test_nothing_is_left_to_step_back_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, 1)
    monkeypatch.setenv(environment.STEP_BACK, "1")
    with oc.Agent(root) as agent, pytest.raises(oc.NothingToRestore, match="leave out the newest 1 of 1"):
        agent.restore(LIKE)

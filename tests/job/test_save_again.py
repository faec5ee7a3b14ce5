"""A save that did not come about leaves no trace in what is due: the same step is due again, and is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat, environment, failpoints
from orchestrator.observe import events
from tests.support.runs import state

FAILED = [
    *("save.stage=error", "save.write=enospc", "save.write=memory", "save.seal=eio", "receipt.write=error"),
    *("receipt.after=error", "intent.before=error", "finalize.before=error", "manifest.before=error"),
    *("commit.before=error",),
]


@jax.tree_util.register_pytree_node_class
class Interrupting:
    """A part of a state at which Ctrl-C comes."""

    def tree_flatten(self) -> Any:
        raise KeyboardInterrupt

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Interrupting:
        return cls()


@contextmanager
def interrupted_once_begun() -> Iterator[None]:
    def on_event(event: events.Event) -> None:
        if isinstance(event, events.SaveStarted):
            raise KeyboardInterrupt

    end = events.subscribe(on_event)
    try:
        yield
    finally:
        end()


@dataclasses.dataclass
class Saver:
    """An agent or a manager, as the table below uses it."""

    save: Callable[..., bool]
    should_save: Callable[[int], bool]
    finish: Callable[[], None]
    steps: Callable[[], list[int]]
    close: Callable[[], None]


def agent(root: Path, **options: Any) -> Saver:
    made = oc.Agent(root, save=oc.every(10), options=oc.Options(**options))
    return Saver(made.save, made.should_save, made.wait_until_finished, made.all_steps, made.close)


def manager(root: Path) -> Saver:
    made = compat.CheckpointManager(root, options=ocp.CheckpointManagerOptions(save_interval_steps=10))

    def save(step: int, tree: Any, **more: Any) -> bool:
        return made.save(step, args=ocp.args.StandardSave(tree), **more)

    return Saver(save, made.should_save, made.wait_until_finished, made.all_steps, made.close)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def configure(text: str) -> None:
        monkeypatch.setenv(environment.FAILPOINTS, text)

    yield configure
    monkeypatch.undo()
    failpoints.configure({}, 0)


@pytest.mark.parametrize("open_saver", [agent, manager], ids=["agent", "manager"])
@pytest.mark.parametrize("failpoint", FAILED)
def test_a_step_whose_save_failed_is_due_again_and_is_saved(
    failpoint: str, open_saver: Callable[[Path], Saver], root: Path, failing: Callable[[str], None]
) -> None:
    failing(f"{failpoint}@step=20@nth=1")
    saver = open_saver(root)
    assert saver.save(10, state(10)) and saver.save(20, state(20))
    saver.finish()
    assert saver.steps() == [10]
    assert saver.should_save(20) and not saver.should_save(25) and saver.should_save(30)
    assert saver.save(20, state(20))
    saver.finish()
    assert saver.steps() == [10, 20]
    assert not saver.save(20, state(20)) if open_saver is agent else not saver.should_save(20)
    saver.close()


@pytest.mark.parametrize("open_saver", [agent, manager], ids=["agent", "manager"])
@pytest.mark.parametrize(
    ("tree", "more", "error"),
    [
        (state(20) | {"w": Interrupting()}, {}, KeyboardInterrupt),
        (state(20) | {"w": np.array([object()])}, {}, oc.UsageError),
        (state(20), {"metrics": {"loss": {1, 2}}}, oc.UsageError),
    ],
    ids=["Ctrl-C", "leaf", "metrics"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_step_whose_save_was_not_begun_is_due_again_and_is_saved(
    first: bool, tree: Any, more: Any, error: type[BaseException], open_saver: Callable[[Path], Saver], root: Path
) -> None:
    saver = open_saver(root)
    before = [] if first else [10]
    for step in before:
        assert saver.save(step, state(step))
    with pytest.raises(error):
        saver.save(20, tree, **more)
    assert saver.should_save(20)
    assert saver.save(20, state(20))
    saver.finish()
    assert saver.steps() == [*before, 20]
    saver.close()


@pytest.mark.parametrize("open_saver", [agent, manager], ids=["agent", "manager"])
def test_a_save_that_was_begun_when_ctrl_c_came_is_saved_and_not_begun_twice(
    open_saver: Callable[[Path], Saver], root: Path
) -> None:
    saver = open_saver(root)
    with interrupted_once_begun(), pytest.raises(KeyboardInterrupt):
        saver.save(20, state(20))
    if open_saver is manager:
        assert not saver.should_save(20)
    assert not saver.save(20, state(20))
    saver.finish()
    assert saver.steps() == [20]
    saver.close()


def test_a_manager_does_not_wait_to_say_that_a_step_in_flight_is_not_due(
    root: Path, failing: Callable[[str], None]
) -> None:
    failing("save.write=delay:2@step=10")
    made = compat.CheckpointManager(root)
    assert made.save(10, args=ocp.args.StandardSave(state(10)))
    assert not made.should_save(10) and made.is_saving_in_progress()
    made.wait_until_finished()
    assert not made.should_save(10)
    made.close()


def test_a_save_that_was_skipped_for_lack_of_room_is_due_again(root: Path) -> None:
    saver = agent(root, host_bytes_max=1, when_full="skip")
    with suppress(oc.SaveFailed):
        saver.save(20, state(20))
        saver.finish()
    assert saver.steps() == [] and saver.should_save(20)
    assert saver.save(20, state(20))  # begun again
    saver.close()

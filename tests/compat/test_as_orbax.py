"""What a program hears from the manager beside its steps: the same from Orbax's and from ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from orchestrator import compat

STATE = ocp.args.StandardSave({"w": jnp.ones(2)})
BOTH = pytest.mark.parametrize("module", [ocp, compat], ids=["orbax", "here"])


class Entries(ocp.logging.AbstractLogger):
    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def log_entry(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        self.entries.append(msg)


def logged(module: Any, root: Path) -> list[dict[str, Any]]:
    log = Entries()
    with module.CheckpointManager(root, logger=log) as manager:
        for step in (1, 2):
            manager.save(step, args=STATE)
            manager.wait_until_finished()
        manager.save(2, args=STATE)  # not due
        manager.wait_until_finished()
        manager.restore(2)
    for entry in log.entries:
        assert entry.pop("directory") == str(root)
    return log.entries


def test_a_logger_hears_of_each_save_and_restore_what_orbax_tells_it(tmp_path: Path) -> None:
    theirs, ours = logged(ocp, tmp_path / "orbax"), logged(compat, tmp_path / "here")
    assert [list(entry) for entry in ours] == [list(entry) for entry in theirs]
    for here, there in zip(ours, theirs, strict=True):
        for name, value in there.items():
            assert type(here[name]) is type(value), name
            if not isinstance(value, float):
                assert here[name] == value, name


@BOTH
def test_of_what_other_programs_have_saved_only_reload_tells(module: Any, tmp_path: Path) -> None:
    by_loss: Any = {"best_fn": lambda metrics: metrics["loss"]}
    with module.CheckpointManager(tmp_path / "run", options=ocp.CheckpointManagerOptions(**by_loss)) as job:
        job.save(1, args=STATE)
        job.wait_until_finished()
        reading = ocp.CheckpointManagerOptions(read_only=True, **by_loss)
        evaluator = module.CheckpointManager(tmp_path / "run", options=reading)
        job.save(2, args=STATE, metrics={"loss": 1.0})
        job.wait_until_finished()
        assert (list(evaluator.all_steps()), evaluator.latest_step(), evaluator.best_step()) == ([1], 1, None)
        evaluator.reload()
        assert (list(evaluator.all_steps()), evaluator.latest_step(), evaluator.best_step()) == ([1, 2], 2, 2)


@BOTH
def test_the_newest_step_goes_where_others_are_better_and_may_be_saved_again(module: Any, tmp_path: Path) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min")
    seen = []
    with module.CheckpointManager(tmp_path / "run", options=options) as manager:
        for step, loss, force in [(1, 2.0, False), (2, 3.0, False), (2, 1.0, True), (3, 1.5, False)]:
            assert manager.save(step, args=STATE, metrics={"loss": loss}, force=force)
            manager.wait_until_finished()
            seen.append((list(manager.all_steps()), manager.latest_step(), manager.best_step()))
    assert seen == [([1], 1, 1), ([1], 1, 1), ([2], 2, 2), ([2], 2, 2)]
    with module.CheckpointManager(tmp_path / "run") as manager:
        assert (manager.latest_step(), manager.metrics(2)) == (2, {"loss": 1.0})


@BOTH
def test_the_only_step_is_deleted_and_saved_anew(module: Any, tmp_path: Path) -> None:
    with module.CheckpointManager(tmp_path / "run") as manager:
        manager.save(0, args=STATE)
        manager.wait_until_finished()
        manager.delete(0)
        assert (list(manager.all_steps()), manager.latest_step()) == ([], None)
    with module.CheckpointManager(tmp_path / "run") as manager:
        assert manager.latest_step() is None
        assert manager.save(0, args=ocp.args.StandardSave({"w": jnp.zeros(3)}))
        manager.wait_until_finished()
        assert jax.tree.map(jnp.shape, manager.restore(0)) == {"w": (3,)}


def answers(module: Any, root: Path) -> list[Any]:
    """Of a step with numbers and text."""
    saved = {"n": 3, "f": 2.5, "yes": True, "w": jnp.ones(2)}
    with module.CheckpointManager(root) as manager:
        manager.save(1, args=ocp.args.Composite(s=ocp.args.StandardSave(saved), t=ocp.args.PyTreeSave({"x": "text"})))
        manager.wait_until_finished()
        manager.restore(1)
        about = manager.item_metadata(1)
        described = {
            path[0].key: (leaf.shape, str(leaf.dtype)) for path, leaf in jax.tree.leaves_with_path(about.s.tree)
        }
        found: list[Any] = [described, type(about.t.tree["x"]).__name__, manager.metrics(7)]
        for target in (ocp.utils.to_shape_dtype_struct, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)):
            args = ocp.args.StandardRestore(jax.tree.map(target, about.s.tree))
            restored = manager.restore(1, args=ocp.args.Composite(s=args)).s
            found.append(
                {name: (type(value).__name__, str(value.dtype), value.tolist()) for name, value in restored.items()}
            )
        with pytest.raises(KeyError):
            manager.restore(1, args=ocp.args.Composite(other=ocp.args.StandardRestore()))
        return found


def test_numbers_and_text_are_described_and_restored_as_orbax_does(tmp_path: Path) -> None:
    assert answers(compat, tmp_path / "here") == answers(ocp, tmp_path / "orbax")

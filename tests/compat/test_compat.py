"""`orchestrator.compat`: loops written for Orbax, moved over by changing one import."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

import orchestrator as oc
from orchestrator import compat, environment, failpoints
from tests.support.jobs import orbax_loops

IMPORT = "import orbax.checkpoint as ocp\n"
SOURCE = Path(orbax_loops.__file__).read_text()


def moved() -> dict[str, Any]:
    """The loops' module with its one import changed, and nothing else."""
    assert SOURCE.count(IMPORT) == 1
    namespace: dict[str, Any] = {"__name__": "moved"}
    exec(compile(SOURCE.replace(IMPORT, "import orchestrator.compat as ocp\n"), "moved", "exec"), namespace)
    return namespace


def assert_equal(here: Any, orbax: Any) -> None:
    assert jax.tree.structure(here) == jax.tree.structure(orbax)
    for ours, theirs in zip(jax.tree.leaves(here), jax.tree.leaves(orbax), strict=True):
        if isinstance(theirs, jax.Array | np.ndarray):
            assert type(ours) is type(theirs)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs
            assert type(ours) is type(theirs)


@pytest.mark.parametrize("loop", orbax_loops.LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_written_for_orbax_does_the_same_with_one_import_changed(loop: Any, tmp_path: Path) -> None:
    theirs = loop(tmp_path / "orbax")
    ours = moved()[loop.__name__](tmp_path / "here")
    assert_equal(ours, theirs)
    runs = [each.parent for each in (tmp_path / "here").rglob("journal")]
    assert runs, "the steps are in runs of ours"


def test_no_module_of_ours_hides_a_name_of_orbax() -> None:
    ours = {module.name for module in pkgutil.iter_modules(compat.__path__)}
    assert "manager" in ours and not [name for name in ours if hasattr(orbax.checkpoint, name)]


def manager(root: Path, **options: Any) -> compat.CheckpointManager:
    return compat.CheckpointManager(root, options=orbax.checkpoint.CheckpointManagerOptions(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"step_prefix": "ckpt"}, r"step_prefix='ckpt'\): not supported; steps are found by their number"),
        ({"todelete_subdir": "trash"}, "todelete_subdir"),
        *(
            ({"atomicity_options": option()}, "atomicity_options")
            for option in [getattr(orbax.checkpoint.options, "AtomicityOptions", None)]
            if option  # not in Orbax 0.11.34
        ),
        (
            {"multiprocessing_options": orbax.checkpoint.options.MultiprocessingOptions(primary_host=None)},
            "multiprocessing_options",
        ),
        (
            {"async_options": orbax.checkpoint.options.AsyncOptions(post_finalization_callback=print)},
            "post_finalization_callback",
        ),
        (
            {
                "save_decision_policy": orbax.checkpoint.checkpoint_managers.ContinuousCheckpointingPolicy(
                    minimum_interval_secs=1
                )
            },
            "ContinuousCheckpointingPolicy",
        ),
    ],
)
def test_an_option_without_a_counterpart_is_rejected_by_name(options: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(oc.UsageError, match=said):
        manager(root, **options)
    assert not root.exists()


def test_an_item_without_a_counterpart_is_rejected_by_name_and_nothing_is_written(root: Path) -> None:
    args = orbax.checkpoint.args
    state = args.StandardSave({"w": jnp.ones(2)})
    with compat.CheckpointManager(root) as running:
        with pytest.raises(oc.UsageError, match="item 'blob': ProtoSaveArgs has a handler of its own"):
            running.save(1, args=args.Composite(state=state, blob=args.ProtoSave(None)))
        with pytest.raises(oc.UsageError, match="item 'default': StandardSaveArgs\\(save_args="):
            running.save(1, args=args.StandardSave({"w": jnp.ones(2)}, save_args={"w": 1}))
        with pytest.raises(oc.UsageError, match="none is a pytree of arrays"):
            running.save(1, args=args.Composite(meta=args.JsonSave({"a": 1})))
        assert running.all_steps() == []
        running.save(1, args=state)
        running.wait_until_finished()
        with pytest.raises(oc.UsageError, match="strict=False"):
            running.restore(1, args=args.StandardRestore({"w": jnp.ones(3)}, strict=False))
        with pytest.raises(oc.Mismatch, match="w: checkpoint f32\\[2\\], target f32\\[3\\]"):
            running.restore(1, args=args.StandardRestore({"w": jnp.ones(3)}))
        with pytest.raises(oc.UsageError, match="holds a single, unnamed item; got CompositeArgs"):
            running.restore(1, args=args.Composite(state=args.StandardRestore()))
    with pytest.raises(oc.UsageError, match="has a handler of its own"):
        compat.CheckpointManager(root, item_handlers={"a": orbax.checkpoint.ProtoCheckpointHandler("a")})


def test_what_compat_saves_is_an_ordinary_run_and_a_native_run_opens_in_compat(root: Path) -> None:
    args = orbax.checkpoint.args
    with compat.CheckpointManager(root) as running:
        running.save(3, args=args.StandardSave({"w": jnp.ones(2)}))
    with oc.Agent(root) as agent:
        restored = agent.restore({"w": jnp.zeros(2)})
        assert restored is not None
        assert restored.step == 3
        agent.save(4, {"w": jnp.full(2, 4.0)}, metrics={"loss": 1.0})
    with compat.CheckpointManager(root) as running:
        assert running.all_steps() == [3, 4]
        assert running.metrics(4) == {"loss": 1.0}
        assert float(running.restore(4)["w"][0]) == 4.0


def test_restore_of_no_step_steps_down_past_a_damaged_one(root: Path) -> None:
    args = orbax.checkpoint.args
    with compat.CheckpointManager(root) as running:
        for step in (1, 2):
            running.save(step, args=args.StandardSave({"w": jnp.full(2, float(step))}))
        running.wait_until_finished()
        (manifest,) = root.glob("steps/00000002/*/manifest.json")
        manifest.write_bytes(b"{}")
        with pytest.raises(oc.Damaged):
            running.restore(2)
        assert float(running.restore()["w"][0]) == 1.0
        assert running.latest_step() == 1  # quarantined


def test_a_second_manager_that_only_reads_does_not_fence_the_first(root: Path) -> None:
    args = orbax.checkpoint.args
    with compat.CheckpointManager(root) as running:
        running.save(1, args=args.StandardSave({"w": jnp.ones(2)}))
        running.wait_until_finished()
        reader = compat.CheckpointManager(root)
        assert reader.latest_step() == 1
        reader.restore(1)
        assert running.save(2, args=args.StandardSave({"w": jnp.ones(2)}))
        running.wait_until_finished()
        assert running.all_steps() == [1, 2]
        writer = compat.CheckpointManager(root)
        writer.save(3, args=args.StandardSave({"w": jnp.ones(2)}))
        writer.wait_until_finished()
        with pytest.raises(oc.UsageError, match="a newer agent of this process took over its root"):
            running.save(4, args=args.StandardSave({"w": jnp.ones(2)}))
        writer.close()
        writer.close()


def test_orbax_steps_that_are_not_adopted_are_not_overlooked(root: Path) -> None:
    with orbax.checkpoint.CheckpointManager(root) as theirs:
        theirs.save(7, args=orbax.checkpoint.args.StandardSave({"w": jnp.ones(2)}))
    with pytest.raises(oc.UsageError, match=r"holds 1 steps of Orbax's own \(newest 7\).*orchestrator adopt"):
        compat.CheckpointManager(root)


def test_a_save_that_failed_is_tried_again_and_does_not_end_the_loop(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = orbax.checkpoint.args.StandardSave({"w": jnp.ones(2)})
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=error@step=1")
    with compat.CheckpointManager(root) as running:
        assert running.save(1, args=args)
        running.wait_until_finished()
        assert running.all_steps() == []
        monkeypatch.delenv(environment.FAILPOINTS)
        failpoints.configure({}, 0)
        assert running.save(1, args=args, force=True)
        running.wait_until_finished()
        assert running.all_steps() == [1]
        with pytest.raises(orbax.checkpoint.checkpoint_manager.StepAlreadyExistsError, match="step 1 is there already"):
            running.save(1, args=args, force=True)

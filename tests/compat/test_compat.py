"""`orchestrator.compat`: loops written for Orbax, moved over by changing one import."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

import orchestrator as oc
from orchestrator import compat, environment, failpoints
from orchestrator.rules import keys
from tests.support.jobs import orbax_loops, orbax_projects, orbax_usage

IMPORT = "import orbax.checkpoint as ocp\n"


def moved(module: ModuleType) -> dict[str, Any]:
    """A module of loops with its one import changed, and nothing else."""
    source = Path(module.__file__ or "").read_text()
    assert source.count(IMPORT) == 1
    namespace: dict[str, Any] = {"__name__": "moved"}
    exec(compile(source.replace(IMPORT, "import orchestrator.compat as ocp\n"), "moved", "exec"), namespace)
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


@pytest.mark.parametrize(
    "loop", (*orbax_loops.LOOPS, *orbax_usage.LOOPS, *orbax_projects.LOOPS), ids=lambda loop: loop.__name__
)
def test_a_loop_written_for_orbax_does_the_same_with_one_import_changed(loop: Any, tmp_path: Path) -> None:
    theirs = loop(tmp_path / "orbax")
    ours = moved(sys.modules[loop.__module__])[loop.__name__](tmp_path / "here")
    assert_equal(ours, theirs)
    runs = [each.parent for each in (tmp_path / "here").rglob("journal")]
    assert runs, "the steps are in runs of ours"


def test_no_module_of_ours_hides_a_name_of_orbax() -> None:
    ours = {module.name for module in pkgutil.iter_modules(compat.__path__)}
    assert "manager" in ours and {name for name in ours if hasattr(orbax.checkpoint, name)} <= {
        "v1"
    }  # ours, on purpose


def manager(root: Path, **options: Any) -> compat.CheckpointManager:
    return compat.CheckpointManager(root, options=orbax.checkpoint.CheckpointManagerOptions(**options))


_PROCESSES = orbax.checkpoint.options.MultiprocessingOptions
_ASYNC = orbax.checkpoint.options.AsyncOptions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"todelete_subdir": "../trash"}, "a name below the run's root"),
        ({"todelete_subdir": "7"}, "a name below the run's root"),
        ({"todelete_full_path": "a//b"}, "a name below the run's root"),
        *(({"todelete_subdir": f"{name}/trash"}, "none of the run's own") for name in sorted(keys.AT_ROOT)),
        ({"multiprocessing_options": _PROCESSES(active_processes={1})}, r"active_processes=\[1\]"),
        (
            {"max_to_keep": 1, "preservation_policy": orbax.checkpoint.checkpoint_managers.LatestN(1)},
            "preservation_policy excludes",
        ),
    ],
)
def test_an_option_without_a_counterpart_is_rejected_by_name(options: dict[str, Any], said: str, root: Path) -> None:
    with pytest.raises(oc.UsageError, match=said):
        manager(root, **options)
    assert not root.exists()


@pytest.mark.parametrize(
    "options",
    [
        # Not in Orbax 0.11.34.
        *(
            {"atomicity_options": getattr(orbax.checkpoint.options, name)()}
            for name in {"AtomicityOptions"} & vars(orbax.checkpoint.options).keys()
        ),
        {"file_options": orbax.checkpoint.options.FileOptions(path_permission_mode=0o750)},
        {"multiprocessing_options": _PROCESSES(primary_host=None)},
        {"multiprocessing_options": _PROCESSES(active_processes={0}, barrier_sync_key_prefix="a")},
        {"async_options": _ASYNC(barrier_sync_fn=print)},
        {"todelete_subdir": "ttl=1h"},
        {"step_prefix": "ckpt", "step_format_fixed_length": 8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_of_orbax_alone_does_not_keep_a_loop_from_running(options: dict[str, Any], root: Path) -> None:
    with manager(root, **options) as running:
        assert running.save(1, args=orbax.checkpoint.args.StandardSave({"w": jnp.ones(2)}))
        running.wait_until_finished()
        assert running.restore(1)["w"].shape == (2,)


def test_an_item_that_does_not_fit_is_rejected_by_name_and_nothing_is_written(root: Path) -> None:
    args = orbax.checkpoint.args
    state = args.StandardSave({"w": jnp.ones(2)})
    with compat.CheckpointManager(root) as running:
        with pytest.raises(oc.UsageError, match="item 'blob': got dict, expected args such as"):
            running.save(1, args=args.Composite(state=state, blob={"a": 1}))
        assert running.all_steps() == []
        running.save(1, args=state)
        running.wait_until_finished()
        with pytest.raises(oc.Mismatch, match="w: checkpoint f32\\[2\\], target f32\\[3\\]"):
            running.restore(1, args=args.StandardRestore({"w": jnp.ones(3)}))
        with pytest.raises(ValueError, match="holds a single, unnamed item; got CompositeArgs"):
            running.restore(1, args=args.Composite(state=args.StandardRestore()))
        with pytest.raises(ValueError, match="this manager has a single, unnamed item"):
            running.save(2, args=args.Composite(state=state))


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

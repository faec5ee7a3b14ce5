"""`orchestrator.compat.v1`: programs written for Orbax's v1 API, moved over by changing one import."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as theirs

import orchestrator as oc
from orchestrator import compat, environment, failpoints
from orchestrator.compat import v1
from tests.compat.test_compat import assert_equal
from tests.support.jobs import orbax_v1_loops
from tests.support.processes import job

SAFETENSORS = theirs.options.CheckpointLayout.SAFETENSORS
JOB = Path(__file__).parents[1] / "support" / "jobs" / "orbax_v1_job.py"
IMPORT = "from orbax.checkpoint import v1 as ocp\n"


def moved() -> dict[str, Any]:
    source = Path(orbax_v1_loops.__file__ or "").read_text()
    assert source.count(IMPORT) == 1
    namespace: dict[str, Any] = {"__name__": "moved"}
    exec(compile(source.replace(IMPORT, "from orchestrator.compat import v1 as ocp\n"), "moved", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _names_of_this_orbax(request: pytest.FixtureRequest) -> None:
    """Orbax 0.11 has the API under older names, which a program of its own uses."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if not hasattr(theirs, "save") and parameters.get("loop") not in orbax_v1_loops.OLDER:
        pytest.skip("names that Orbax 0.12 has brought")


@pytest.mark.parametrize("loop", orbax_v1_loops.LOOPS, ids=lambda loop: loop.__name__)
def test_a_program_written_for_v1_does_the_same_with_one_import_changed(loop: Any, tmp_path: Path) -> None:
    (tmp_path / "orbax").mkdir()
    (tmp_path / "here").mkdir()
    expected = loop(tmp_path / "orbax")
    found = moved()[loop.__name__](tmp_path / "here")
    assert_equal(found, expected)
    saved = [*(tmp_path / "orbax").rglob("_METADATA")]
    assert bool([*(tmp_path / "here").rglob("journal")]) == bool(saved), "the steps are in runs of ours"


def test_no_name_of_v1_saves_or_loads_by_orbax_alone() -> None:
    handed_through = {*v1._HANDED_THROUGH, *(f"training.{name}" for name in v1.training._HANDED_THROUGH)}
    for module, ours, prefix in ((theirs, v1, ""), (theirs.training, v1.training, "training.")):
        for name in (each for each in vars(module) if not each.startswith("_")):
            here = getattr(ours, name, None)
            assert here is not getattr(module, name) or prefix + name in handed_through, name


def test_what_is_not_covered_raises_by_name() -> None:
    for name in ("partial", "delete", "delete_async"):
        with pytest.raises(AttributeError, match=rf"orchestrator\.compat\.v1\.{name} is not supported; "):
            getattr(v1, name)
    with pytest.raises(AttributeError, match="pathways is not supported"):
        _ = v1.training.pathways
    with pytest.raises(AttributeError, match="has no attribute 'sav'"):
        _ = v1.sav


def test_no_module_of_ours_hides_a_name_of_v1() -> None:
    ours = {module.name for module in pkgutil.iter_modules(v1.__path__)}
    assert {name for name in ours if hasattr(theirs, name)} == {"training"}


@pytest.mark.parametrize("ask", [lambda: compat.v1, lambda: compat.experimental.v1], ids=["v1", "experimental.v1"])
def test_v1_is_ours_however_it_is_reached(ask: Any) -> None:
    assert ask() is v1
    with pytest.raises(AttributeError):
        _ = compat.experimental.nothing


def test_a_checkpoint_is_an_ordinary_run_and_steps_of_a_native_run_are_checkpoints(root: Path) -> None:
    with oc.Agent(root) as agent:
        agent.save(4, {"w": jnp.full(2, 4.0)})
    with v1.training.Checkpointer(root) as checkpointer:
        assert checkpointer.latest.step == 4
        np.testing.assert_array_equal(checkpointer.load(4)["w"], [4.0, 4.0])
    with pytest.raises(oc.UsageError, match=r"a run with steps \[4\]"):
        v1.save(root, {"w": jnp.ones(2)}, overwrite=True)
    v1.save(root / "alone", {"w": jnp.ones(2)})
    assert oc.open_run(root / "alone").latest_step() == 0
    np.testing.assert_array_equal(v1.load(root)["w"], [4.0, 4.0])


def test_plain_orbax_loads_steps_and_checkpoints_of_ours_by_their_paths(root: Path) -> None:
    with v1.training.Checkpointer(root) as checkpointer:
        checkpointer.save(3, {"w": jnp.ones(2)})
    np.testing.assert_array_equal(theirs.load(root / "3")["w"], [1.0, 1.0])
    for value in (2.0, 3.0):
        v1.save_checkpointables(root / "one", {"state": {"w": jnp.full(2, value)}, "journal": {"a": 1}}, overwrite=True)
        np.testing.assert_array_equal(theirs.load(root / "one")["w"], [value, value])
        np.testing.assert_array_equal(v1.load(root / "one")["w"], [value, value])
    assert v1.load_checkpointables(root / "one")["journal"] == {"a": 1}
    with pytest.raises(v1.errors.InvalidLayoutError):
        v1.load(root / "one" / "state")  # a part of a checkpoint is none


def test_what_orbax_has_written_is_rejected_with_the_way_out(root: Path) -> None:
    theirs.save(root, {"w": jnp.ones(2)})
    with pytest.raises(oc.UsageError, match="was written by Orbax itself"):
        v1.load(root)
    with pytest.raises(oc.UsageError, match="no checkpoint of ours; delete it"):
        v1.save(root, {"w": jnp.ones(2)}, overwrite=True)
    assert theirs.load(root)["w"].shape == (2,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda context: setattr(context, "checkpoint_layout", v1.options.CheckpointLayout.SAFETENSORS),
            "checkpoint_layout=SAFETENSORS",
        ),
        (lambda context: setattr(context.multiprocessing, "active_processes", {1}), r"active_processes=\[1\]"),
    ],
)
def test_an_option_without_a_counterpart_is_rejected_by_name(change: Any, said: str, root: Path) -> None:
    context = v1.Context()
    change(context)
    with pytest.raises(oc.UsageError, match=said):
        v1.training.Checkpointer(root, context=context)
    with context, pytest.raises(oc.UsageError, match=said):
        v1.save(root, {"w": jnp.ones(2)})
    assert not root.exists()


def test_a_lost_save_is_told_and_ends_no_loop(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": jnp.ones(2)}
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=error@step=1")
    with v1.training.Checkpointer(root) as checkpointer:
        lost = checkpointer.save_async(1, state)
        assert lost is not None
        checkpointer.wait()
        called: list[bool] = []
        lost.on_complete(called.append)
        assert lost.result() is False and called == []
        assert checkpointer.save(2, state)
        assert [each.step for each in checkpointer.checkpoints] == [2]
        assert lost.result() is False
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=error")
    with v1.training.Checkpointer(root.parent / "unlucky") as checkpointer:
        asked_late = [checkpointer.save_async(step, state, force=True) for step in (1, 2)]
        assert [each and each.result() for each in asked_late] == [False, False]
    with pytest.raises(oc.SaveFailed):
        v1.save(root.parent / "alone", state)
    monkeypatch.delenv(environment.FAILPOINTS)
    failpoints.configure({}, 0)
    v1.save(root.parent / "alone", state)  # nothing of it is in the way


def test_a_replaced_checkpoint_stays_until_the_new_one_is_committed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1.save(root, {"w": jnp.ones(2)})
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=error")
    with pytest.raises(oc.SaveFailed):
        v1.save(root, {"w": jnp.zeros(2)}, overwrite=True)
    monkeypatch.delenv(environment.FAILPOINTS)
    failpoints.configure({}, 0)
    np.testing.assert_array_equal(v1.load(root)["w"], [1.0, 1.0])


def test_load_of_no_step_steps_down_past_a_damaged_one(root: Path) -> None:
    with v1.training.Checkpointer(root) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": jnp.full(2, float(step))})
        (manifest,) = root.glob("steps/00000002/*/manifest.json")
        manifest.write_bytes(b"{}")
        with pytest.raises(oc.Damaged):
            checkpointer.load(2)
        np.testing.assert_array_equal(checkpointer.load()["w"], [1.0, 1.0])
        assert checkpointer.latest.step == 1


def test_the_processes_of_a_job_save_together_and_hear_the_same_of_each_save(tmp_path: Path) -> None:
    lost = {environment.FAILPOINTS: "save.write=error@step=1"}
    with job(2, 2, tmp_path / "runs", tmp_path / "logs", environ=lost, program=JOB) as running:
        (first,), (second,) = (running.wait_for(process, "done", 120) for process in (0, 1))
        assert running.wait(60) == [0, 0], running.story()
    assert (first.pop("position"), second.pop("position")) == (3, 103)
    assert first == second
    assert (first["results"], first["steps"], first["whole"]) == ([True, False, True, True], [0, 3], True)
    assert (first["files"], first["replaced"], first["sharding"]) == (["position-0", "position-1"], True, True)


def test_a_target_over_an_abstract_mesh_goes_onto_the_mesh_that_is_set_or_its_leaf_is_named(tmp_path: Path) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    abstract = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("x")
    v1.save(tmp_path / "one", {"w": jnp.arange(8.0)})
    like = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(abstract, rows))}
    with jax.set_mesh(mesh):
        assert v1.load(tmp_path / "one", like)["w"].sharding.is_equivalent_to(NamedSharding(mesh, rows), 1)
    with pytest.raises(oc.Mismatch, match=r"w: the target's sharding .* no mesh is set"):
        v1.load(tmp_path / "one", like)

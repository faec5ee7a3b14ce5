"""`orchestrator adopt`: real directories of Orbax's CheckpointManager, taken over where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator import compat, environment, failpoints
from orchestrator.cli.main import main
from tests.support.adopting import adopt, assert_same
from tests.support.snapshots import snapshot

FORMATS = {
    "zarr2 in ocdbt, Orbax's default": None,
    "zarr3": ocp.PyTreeCheckpointHandler(use_zarr3=True),
    "a directory for each array": ocp.PyTreeCheckpointHandler(use_ocdbt=False),
}


def state(mesh: jax.sharding.Mesh, step: int) -> dict[str, Any]:
    params = {"w": jnp.arange(32.0).reshape(8, 4) + step, "b": jnp.full(3, step, jnp.bfloat16)}
    rows = NamedSharding(mesh, PartitionSpec("data", "model"))
    return {
        "params": {**params, "w": jax.device_put(params["w"], rows)},
        "optimizer": optax.adam(1e-3).init(params),
        "key": jax.random.key(step),
        "layers": [np.arange(step, step + 3), (jnp.float32(2.5),)],
        "step": step,
        "rate": 0.1,
        "nothing": None,
    }


def orbax_run(root: Path, mesh: jax.sharding.Mesh, handler: Any = None, steps: tuple[int, ...] = (10, 20)) -> None:
    more = {} if handler is None else {"item_handlers": handler}
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    kind = ocp.args.StandardSave if handler is None else ocp.args.PyTreeSave
    with ocp.CheckpointManager(root, options=options, **more) as manager:
        for step in steps:
            manager.save(step, args=kind(state(mesh, step)), metrics={"loss": 1 / step}, custom_metadata={"n": step})


@pytest.mark.parametrize("handler", FORMATS.values(), ids=FORMATS)
def test_an_orbax_run_is_restored_in_place_and_saves_go_on_in_our_layout(
    handler: Any, root: Path, mesh8: jax.sharding.Mesh
) -> None:
    orbax_run(root, mesh8, handler)
    before = {path: digest for path, digest in snapshot(root).items()}
    inodes = {path.stat().st_ino for path in root.rglob("*") if path.is_file()}
    assert adopt(root) == 0
    assert {path: snapshot(root)[path] for path in before} == before, "Orbax's own files are as they were"
    big = [path for path in root.glob("steps/*/*/state/**/*") if path.is_file()]
    assert big and all(path.stat().st_ino in inodes for path in big), "nothing is copied"

    other = jax.make_mesh((2, 4), ("data", "model"))
    like = state(other, 0)
    with oc.Agent(root, keep=oc.last(2)) as agent:
        restored = agent.restore(like)
        assert restored is not None and restored.step == 20
        assert restored.metrics == {"loss": 1 / 20}
        assert restored.extra["orbax"]["custom_metadata"] == {"n": 20}
        assert_same(restored.state, state(other, 20))
        assert restored.state["params"]["w"].sharding == like["params"]["w"].sharding
        agent.save(21, state(other, 21))  # the same job, by its tree
        agent.wait_until_finished()
        assert agent.failures == 0
        assert agent.all_steps() == [20, 21]
    assert main(["orchestrator", "verify", str(root), "--all"]) == 0
    with ocp.CheckpointManager(root) as manager:  # retention has let go of our step 10, not of Orbax's
        assert list(manager.all_steps()) == [10, 20]
    with compat.CheckpointManager(root) as moved:
        assert moved.all_steps() == [20, 21]
        assert_same(moved.restore(20, args=ocp.args.StandardRestore(like)), state(other, 20))


def test_several_items_json_and_iterators_are_adopted_and_restored_by_compat(root: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "orbax"
    items = {"state": {"w": jnp.ones((4, 2)), "l": [jnp.zeros(1)]}, "ema": {"w": jnp.zeros((4, 2))}}
    with ocp.CheckpointManager(theirs, item_names=("state", "ema", "data")) as manager:
        for step in (1, 2):
            args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            manager.save(step, args=ocp.args.Composite(data=ocp.args.JsonSave({"epoch": step}), **args))
    for step in (1, 2):  # as grain's CheckpointHandler writes it
        (theirs / str(step) / "reader").mkdir()
        for process in (0, 1):
            (theirs / str(step) / "reader" / f"process_{process}-of-2.json").write_text(json.dumps({"next": step}))
    assert adopt(root, f"--from={theirs}") == 0
    with compat.CheckpointManager(root) as moved:
        restored = moved.restore(2)
        assert_same({name: restored[name] for name in items}, items)
        assert restored["data"] == {"epoch": 2}
        states = oc.open_run(root).restore(step=2).process_states
    assert {index: json.loads(body) for index, body in states.items()} == {
        index: {"reader": '{"next": 2}'} for index in (0, 1)
    }


def test_an_nnx_run_of_orbax_goes_on_with_the_same_module(root: Path) -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with ocp.CheckpointManager(root) as manager:
        manager.save(1, args=ocp.args.StandardSave(nnx.state(model)))
    assert adopt(root) == 0
    with oc.Agent(root) as agent:
        restored = agent.restore(nnx.state(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(1)))))
        assert restored is not None
        assert_same(nnx.to_pure_dict(restored.state), nnx.to_pure_dict(nnx.state(model)))
        agent.save(2, nnx.state(model))
        agent.wait_until_finished()
        assert agent.all_steps() == [1, 2]


def test_one_flipped_bit_of_an_adopted_step_is_noticed_and_the_step_before_is_taken(
    root: Path, mesh8: jax.sharding.Mesh
) -> None:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    orbax_run(root, mesh8, handler)
    assert adopt(root) == 0
    chunk = root / "20" / "default" / "params.w" / "0.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with ocp.CheckpointManager(root) as manager:  # Orbax itself does not notice
        wrong = manager.restore(20, args=ocp.args.PyTreeRestore(state(mesh8, 0)))
        assert not np.array_equal(wrong["params"]["w"], state(mesh8, 20)["params"]["w"])
    with oc.Agent(root) as agent:
        restored = agent.restore(state(mesh8, 0))
        assert restored is not None and restored.step == 10
        assert agent.all_steps() == [10]


def test_adopting_again_takes_only_what_is_new_and_leaves_what_is_older_than_the_run(
    root: Path, mesh8: jax.sharding.Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    orbax_run(root, mesh8)
    assert adopt(root, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["steps"] == [10, 20] and first["bytes"] > 1000
    orbax_run(root, mesh8, steps=(30,))
    assert adopt(root, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["steps"], again["older"]) == ([30], [])
    assert [each["verdict"] for each in again["found"]] == ["there", "there", "adopt"]
    with oc.Agent(root) as agent:
        agent.save(50, state(mesh8, 50))
    orbax_run(root, mesh8, steps=(40,))
    entries = len(list((root / "journal").iterdir()))
    assert adopt(root) == 0
    assert "left where they are, as the run has newer steps: 40" in capsys.readouterr().out
    assert len(list((root / "journal").iterdir())) == entries, "nothing to adopt: no epoch is opened"


def test_what_cannot_be_adopted_is_named_and_nothing_is_written(
    root: Path, tmp_path: Path, mesh8: jax.sharding.Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    assert adopt(root, f"--from={tmp_path}") == 2
    assert "no steps of an Orbax CheckpointManager in it" in capsys.readouterr().err
    theirs = tmp_path / "orbax"
    orbax_run(theirs, mesh8)
    (theirs / "20" / "assets").mkdir()
    (theirs / "20" / "assets" / "vocabulary.bin").write_bytes(b"x")
    assert adopt(root, f"--from={theirs}") == 2
    assert "item 'assets' is neither a pytree, JSON nor a grain iterator" in capsys.readouterr().err
    assert not root.exists()
    assert adopt(root, f"--from={theirs}", "--skip=assets") == 0
    unfinished = theirs / "99.orbax-checkpoint-tmp"
    os.makedirs(unfinished)
    assert adopt(root, f"--from={theirs}") == 0
    assert oc.open_run(root).all_steps() == [10, 20]


@pytest.mark.parametrize("nth", [4, 13, 31])
def test_a_crash_in_the_middle_leaves_whole_steps_and_adopting_again_goes_on(
    nth: int, root: Path, mesh8: jax.sharding.Mesh
) -> None:
    orbax_run(root, mesh8)
    failpoints.configure({environment.FAILPOINTS: f"storage.link=error@nth={nth}"}, 0)
    try:
        assert adopt(root) == 1
    finally:
        failpoints.configure({}, 0)
    if (root / "journal").exists():
        assert main(["orchestrator", "verify", str(root), "--all"]) == 0 or not oc.open_run(root).all_steps()
    assert adopt(root) == 0
    assert oc.open_run(root).all_steps() == [10, 20]
    assert main(["orchestrator", "verify", str(root), "--all"]) == 0
    assert main(["orchestrator", "gc", str(root)]) == 0  # what the crash has left
    files = [path.relative_to(root / "steps") for path in (root / "steps").rglob("*") if path.is_file()]
    assert len({path.parts[:2] for path in files}) == 2

"""`orchestrator export ROOT DEST`: Orbax's own manager reads every step of a run, agrees on the best, and goes on."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.cli.main import main
from orchestrator.compat import export_run
from orchestrator.rules import removal
from tests.support.runs import now, store_of
from tests.support.snapshots import snapshot

ARGS = ocp.args
LOSSES = {1: 0.5, 2: 0.1, 3: 0.3}


def export(run: Path, destination: object, *more: str) -> int:
    return main(["orchestrator", "export", str(run), str(destination), *more])


def state(step: int) -> dict[str, Any]:
    params = {"w": jnp.full((8, 4), float(step)), "b": jnp.full(3, step, jnp.bfloat16)}
    return {"params": params, "optimizer": optax.adam(1e-3).init(params), "key": jax.random.key(step), "step": step}


def best() -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min", max_to_keep=None)


def same(found: Any, wanted: Any) -> None:
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def native(root: Path, *steps: int) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step in steps:
            agent.save(step, state(step), metrics={"loss": LOSSES[step]}, extra={"note": f"n{step}"})


def managed(root: Path, *steps: int) -> None:
    names = {"state": ARGS.StandardSave, "ema": ARGS.PyTreeSave}
    with compat.CheckpointManager(root, options=best(), metadata={"team": "x"}) as manager:
        for step in steps:
            items = {name: kind(state(step)["params"]) for name, kind in names.items()}
            manager.save(
                step, args=ARGS.Composite(**items, data=ARGS.JsonSave({"n": step})), metrics={"loss": LOSSES[step]}
            )


def adopted(root: Path, *steps: int) -> None:
    with ocp.CheckpointManager(root, options=best()) as manager:
        for step in steps:
            manager.save(step, args=ARGS.StandardSave(state(step)), metrics={"loss": LOSSES[step]})
    assert main(["orchestrator", "adopt", str(root)]) == 0


@pytest.mark.parametrize("save", [native, adopted], ids=["of an agent", "adopted"])
def test_orbaxs_manager_restores_every_step_agrees_on_the_best_and_goes_on(
    save: Any, root: Path, tmp_path: Path
) -> None:
    save(root, 1, 2, 3)
    before = snapshot(root)
    assert export(root, tmp_path / "out") == 0
    assert snapshot(root) == before
    with ocp.CheckpointManager(tmp_path / "out", options=best()) as manager:
        assert list(manager.all_steps()) == [1, 2, 3] and manager.best_step() == 2
        for step in (1, 2, 3):
            same(manager.restore(step, args=ARGS.StandardRestore(state(0))), state(step))
            assert manager.metrics(step) == {"loss": LOSSES[step]}
        if save is native:
            assert manager.metadata(2).custom_metadata == {"note": "n2"}
        assert manager.save(4, args=ARGS.StandardSave(state(4)), metrics={"loss": 0.01})
    with ocp.CheckpointManager(tmp_path / "out", options=best()) as manager:
        assert list(manager.all_steps()) == [1, 2, 3, 4] and manager.best_step() == 4
    linked = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_nlink > 1]
    assert not linked, "what is exported stays as it is, whatever becomes of the run"


def test_several_items_json_and_root_metadata_go_along(root: Path, tmp_path: Path) -> None:
    managed(root, 1, 2)
    assert export(root, tmp_path / "out") == 0
    with ocp.CheckpointManager(tmp_path / "out", options=best(), item_names=("state", "ema", "data")) as manager:
        assert manager.best_step() == 2 and manager.metadata().custom_metadata == {"team": "x"}
        asked = ARGS.Composite(state=ARGS.StandardRestore(), ema=ARGS.PyTreeRestore(), data=ARGS.JsonRestore())
        restored = manager.restore(1, args=asked)
    same((restored["state"], restored["ema"]), (state(1)["params"], state(1)["params"]))
    assert restored["data"] == {"n": 1}


def test_what_was_exported_can_be_adopted_again(root: Path, tmp_path: Path) -> None:
    managed(root, 1, 2)
    native_root = tmp_path / "native"
    native(native_root, 1, 2)
    for run in (root, native_root):
        assert export(run, tmp_path / f"{run.name}-out") == 0
        assert (
            main(["orchestrator", "adopt", str(tmp_path / f"{run.name}-back"), f"--from={tmp_path}/{run.name}-out"])
            == 0
        )
    same(oc.open_run(tmp_path / "native-back").restore(state(0)).state, state(2))
    with compat.CheckpointManager(tmp_path / f"{root.name}-back", options=best()) as manager:
        assert manager.best_step() == 2 and manager.restore(1)["data"] == {"n": 1}


def test_exporting_again_adds_what_is_new_and_leaves_the_rest(root: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    native(root, 1, 2)
    assert export(root, out) == 0
    with ocp.CheckpointManager(out) as manager:  # Orbax went on, too
        manager.save(9, args=ARGS.StandardSave(state(9)))
    before = snapshot(out)
    native(root, 3)
    store_of(root).append(partial(removal.remove, step=1))  # retired since
    capsys.readouterr()
    assert export(root, out, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["steps"], done["there"], done["step"]) == ([3], [2], 3)
    assert {path: digest for path, digest in snapshot(out).items() if "3" not in Path(path).parts} == before
    with ocp.CheckpointManager(out) as manager:
        assert list(manager.all_steps()) == [1, 2, 3, 9]
    assert export(root, out) == 0
    assert "exported no new steps (2 were there)" in capsys.readouterr().out


def occupied(out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()


def a_file(out: Path) -> None:
    out.touch()


def of_another_run(out: Path) -> None:
    other = out.parent / "another"
    native(other, 3)
    assert export(other, out) == 0


def a_step_of_orbaxs_own(out: Path) -> None:
    native(out.parent / "run-x", 3)
    out.mkdir()
    (out / export_run.MARK).write_text(json.dumps({"root": f"file://{out.parent / 'run'}"}))
    (out / "2").mkdir()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (occupied, "not empty, and no earlier export"),
        (a_file, "is no directory"),
        (of_another_run, "an export of"),
        (a_step_of_orbaxs_own, "is not step 2 e0001-a01 of this run"),
    ],
)
def test_a_place_of_somebody_else_is_rejected_and_unchanged(
    tmp_path: Path, make: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    native(run, 1, 2)
    make(out)
    before = snapshot(tmp_path)
    assert export(run, out) == 2
    assert said in capsys.readouterr().err and snapshot(tmp_path) == before


def test_mistakes_are_one_line_and_nothing_is_written(
    root: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    native(root, 1)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    for words, said in (
        (["10"], "DEST is missing after STEP 10"),
        (["newest"], "DEST is missing after STEP newest"),
        ([], "DEST is missing; usage: orchestrator export ROOT [STEP] DEST"),
        (["out", "--format=numpy"], "takes one step"),
        ([f"{root}/out"], "is in the run itself"),
        ([str(root)], "is in the run itself"),
        (["gs://bucket/x"], "expected a path on this machine"),
    ):
        assert main(["orchestrator", "export", str(root), *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_damaged_step_is_named_and_the_others_are_there(root: Path, tmp_path: Path, capsys: Any) -> None:
    native(root, 1, 2, 3)
    for data in (root / "steps" / "00000002").rglob("d/*"):
        body = bytearray(data.read_bytes())
        body[len(body) // 2] ^= 1
        data.write_bytes(body)
    assert main(["orchestrator", "quarantine", str(root), "1", "--reason=spike"]) == 0
    capsys.readouterr()
    assert export(root, tmp_path / "out", "--json") == 4
    done = json.loads(capsys.readouterr().out)
    assert (done["steps"], done["damaged"]) == ([3], [2])
    assert [each["step"] for each in done["left_out"]] == [1, 2] and "spike" in done["left_out"][0]["why"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [export_run.MARK, "3"]


@pytest.mark.parametrize("nth", [1, 5])
def test_a_step_whose_copy_fails_is_no_step_to_orbax_and_exporting_again_goes_on(
    nth: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native(root, 1, 2)
    out, left = tmp_path / "out", [nth]

    def stops(count: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    with pytest.raises(oc.StorageError, match="exporting again goes on"):
        export_run.export_run(store_of(root), str(out), stops)
    with ocp.CheckpointManager(out) as manager:
        assert list(manager.all_steps()) in ([], [1])
    unfinished = out / "2.orbax-checkpoint-tmp"  # of one that was killed
    (unfinished / "default").mkdir(parents=True)
    with ocp.CheckpointManager(out, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        assert 2 not in manager.all_steps()
    assert export(root, out) == 0
    with ocp.CheckpointManager(out) as manager:
        assert list(manager.all_steps()) == [1, 2]
        same(manager.restore(2, args=ARGS.StandardRestore(state(0))), state(2))
    assert not unfinished.exists()


def test_process_states_of_an_agent_are_said_to_be_left_out(root: Path, tmp_path: Path, capsys: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jnp.ones(2)}, process_state=b'{"next": 3}')
    assert export(root, tmp_path / "out") == 0
    assert "step 1: not there: the process states of an agent" in capsys.readouterr().out
    assert (
        sorted(os.listdir(tmp_path / "out" / "1"))
        == [export_run.MARK, "_CHECKPOINT_METADATA", "default", "metrics"][:3]
    )

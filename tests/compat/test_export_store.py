"""`orchestrator export` of a whole run in Cloud Storage: Orbax's own manager opens what comes of it on this host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.cli.main import main
from orchestrator.compat import export_run
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import gcs_objects, open_storage
from orchestrator.tools import export
from tests.support import gcs
from tests.support.runs import now

ARGS = ocp.args


def state(step: int) -> dict[str, Any]:
    return {"w": jax.random.normal(jax.random.key(step), (32, 32)), "b": jnp.full(3, step, jnp.bfloat16), "step": step}


def options() -> ocp.CheckpointManagerOptions:
    return ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")


def native(root: str) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step in (1, 2):
            agent.save(step, state(step), metrics={"loss": 1 / step}, extra={"note": f"n{step}"})


def managed(root: str) -> None:
    with compat.CheckpointManager(root, options=options(), metadata={"team": "x"}) as manager:
        for step in (1, 2):
            items = {"state": ARGS.StandardSave(state(step)), "data": ARGS.JsonSave({"n": step})}
            manager.save(step, args=ARGS.Composite(**items), metrics={"loss": 1 / step})


def adopted(root: str) -> None:
    with ocp.CheckpointManager(root, options=options()) as manager:
        for step in (1, 2):
            manager.save(step, args=ARGS.StandardSave(state(step)), metrics={"loss": 1 / step})
    assert main(["orchestrator", "adopt", root]) == 0


def same(found: Any, wanted: Any) -> None:
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("save", [native, managed, adopted])
def test_orbaxs_manager_reads_every_step_and_goes_on(save: Any, tmp_path: Path, capsys: Any) -> None:
    root, out = gcs.new_root(), tmp_path / "out"
    save(root)
    before = [entry.key for entry in open_storage(root).list("")]
    capsys.readouterr()
    assert main(["orchestrator", "export", root, str(out), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["steps"], done["there"], done["left_out"]) == ([1, 2], [], [])
    assert [entry.key for entry in open_storage(root).list("")] == before
    with ocp.CheckpointManager(out, options=options()) as manager:
        assert list(manager.all_steps()) == [1, 2] and manager.best_step() == 2
        for step in (1, 2):
            if save is managed:
                asked = ARGS.Composite(state=ARGS.StandardRestore(state(0)), data=ARGS.JsonRestore())
                found = manager.restore(step, args=asked)
                same(found["state"], state(step))
                assert found["data"] == {"n": step}
            else:
                same(manager.restore(step, args=ARGS.StandardRestore(state(0))), state(step))
            assert manager.metrics(step) == {"loss": 1 / step}
        if save is managed:
            assert manager.metadata().custom_metadata == {"team": "x"}
            return
        assert manager.save(3, args=ARGS.StandardSave(state(3)), metrics={"loss": 0.01})
    with ocp.CheckpointManager(out, options=options()) as manager:
        assert list(manager.all_steps()) == [1, 2, 3]
    assert main(["orchestrator", "export", root, str(out)]) == 0
    assert "exported no new steps (2 were there)" in capsys.readouterr().out


def test_a_damaged_step_of_a_store_is_named_and_the_other_is_there(tmp_path: Path, capsys: Any) -> None:
    root, out = gcs.new_root(), tmp_path / "out"
    native(root)
    storage = open_storage(root)
    data = next(entry.key for entry in storage.list("steps/00000001/") if "/d/" in entry.key)
    body = bytearray(storage.get(data) or b"")
    body[len(body) // 2] ^= 1
    storage.delete(data)
    storage.create(data, bytes(body))
    capsys.readouterr()
    assert main(["orchestrator", "export", root, str(out), "--json"]) == 4
    done = json.loads(capsys.readouterr().out)
    assert (done["steps"], done["damaged"]) == ([2], [1])
    assert sorted(name for name in os.listdir(out) if name.isdecimal()) == ["2"]


def test_a_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of adopted steps may be larger than memory."""
    monkeypatch.setattr(gcs_objects, "PIECE_BYTES", 1000)
    monkeypatch.setattr(export, "SLAB_BYTES", 100)
    root, out = gcs.new_root(), tmp_path / "out"
    adopted(root)
    pieces: list[int] = []
    export_run.export_run(JournalStore(open_storage(root), "test"), str(out), pieces.append)
    assert len(pieces) > 8 and max(pieces) <= 1000
    with ocp.CheckpointManager(out, options=options()) as manager:
        same(manager.restore(2, args=ARGS.StandardRestore(state(0))), state(2))

"""The directories of steps beside a run, for what looks into `ROOT/5/...`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.cli.main import main
from orchestrator.compat.store_directory import StoreDirectory
from orchestrator.rules import removal
from orchestrator.run import orbax_views
from tests.support.runs import now, store_of

ARGS = orbax.checkpoint.args


def save(manager: Any, *steps: int) -> None:
    for step in steps:
        manager.save(step, args=ARGS.StandardSave({"w": jnp.full(4, float(step))}))
    manager.wait_until_finished()


def shown(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.isdecimal())


def test_a_step_directory_is_no_step_of_orbax_to_be_adopted(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2, 3)
    assert shown(root) == ["1", "2", "3"]
    # Retired by somebody who was killed before the directory was taken away: it is newer than the run's newest step.
    store_of(root).append(partial(removal.remove, step=3))
    assert shown(root) == ["1", "2", "3"]
    with oc.Agent(root, options=now()) as agent:  # which would be rejected beside Orbax's own steps
        assert agent.save(4, {"w": jnp.zeros(4)})
        assert agent.all_steps() == [1, 2, 4]
    assert main(["orchestrator", "verify", str(root)]) == 0


def test_steps_of_a_native_agent_are_shown_and_lost_directories_are_made_again(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(3, {"w": jnp.ones(2)})
    assert shown(root) == []
    compat.CheckpointManager(root)
    assert shown(root) == ["3"]
    with orbax.checkpoint.StandardCheckpointer() as reader:
        assert reader.restore(root.absolute() / "3" / "default")["w"].shape == (2,)
    for path in (root / "3").rglob("*"):
        assert not path.is_symlink()


def test_a_directory_goes_with_its_step_whoever_retires_it(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2, 3)
        manager.delete(3)
        assert shown(root) == ["1", "2"]
    assert main(["orchestrator", "gc", str(root), "--keep_last=1"]) == 0
    assert shown(root) == ["2"]


def test_a_quarantined_step_is_not_shown(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2)
        (manifest,) = root.glob("steps/00000002/*/manifest.json")
        manifest.write_bytes(b"{}")
        manager.restore()
    compat.CheckpointManager(root)
    assert shown(root) == ["1"]


def test_a_read_only_manager_makes_no_directory(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(3, {"w": jnp.ones(2)})
    options = orbax.checkpoint.CheckpointManagerOptions(read_only=True)
    assert compat.CheckpointManager(root, options=options).restore(3)["w"].shape == (2,)
    assert shown(root) == []


def test_a_directory_of_somebody_else_is_never_touched(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with compat.CheckpointManager(root) as manager:
        save(manager, 1)
        (root / "2").mkdir()
        (root / "2" / "mine").touch()
        (root / "trash").symlink_to(outside)
        save(manager, 2)
    assert (root / "2" / "mine").exists()
    orbax_views.prune(root, None)  # nothing is live: every view goes
    assert shown(root) == ["2"] and (root / "2" / "mine").exists()
    view = root / "7"
    orbax_views.build(root, "7", "step 7 e0001-a01", "trash", lambda directory: None)
    with pytest.raises(oc.UsageError, match="a symbolic link"):
        orbax_views.prune(root, None)
    assert view.is_dir() and os.listdir(outside) == []


def test_a_step_directory_in_a_store_raises_where_orbax_has_one() -> None:
    directory: Any = StoreDirectory("gs://bucket/run")
    for ask in (
        lambda: (directory / "5" / "iter").exists(),
        lambda: directory / "ckpt_5",
        lambda: directory.joinpath("5", "iter"),
        lambda: list(directory.iterdir()),
    ):
        with pytest.raises(oc.UsageError, match="has no director"):
            ask()
    assert os.fspath(directory / "notes.txt") == "gs://bucket/run/notes.txt"
    assert os.fspath(directory) == str(directory) == "gs://bucket/run"

"""Read-only means no write of any kind, whichever method is called: beside a live trainer, whose run stays as it is."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.storage.read_only import ReadOnlyStorage
from tests.support.processes import free_port
from tests.support.snapshots import snapshot

ARGS = ocp.args


def state(step: int) -> Any:
    return ARGS.StandardSave({"w": jnp.full(4096, float(step))})


TARGET = ARGS.StandardRestore({"w": jnp.zeros(4096)})

# Every public name of the manager, and what calling it on a read-only one gives: a value, or a kind of error.
CALLS: dict[str, list[tuple[Callable[[compat.CheckpointManager], Any], Any]]] = {
    "all_steps": [(lambda manager: manager.all_steps(read=True), [0, 1, 2])],
    "best_step": [(lambda manager: manager.best_step(), 2)],
    "check_for_errors": [(lambda manager: manager.check_for_errors(), None)],
    "close": [(lambda manager: manager.close(), None)],
    "delete": [(lambda manager: manager.delete(0), None), (lambda manager: manager.delete(99), None)],
    "directory": [(lambda manager: manager.directory.name, "run")],
    "is_saving_in_progress": [(lambda manager: manager.is_saving_in_progress(), False)],
    "item_metadata": [(lambda manager: manager.item_metadata(2)["w"].shape, (4096,))],
    "latest_step": [(lambda manager: manager.latest_step(), 2)],
    "metadata": [
        (lambda manager: manager.metadata().custom_metadata, {"run": "A"}),
        (lambda manager: manager.metadata(1).metrics, {"loss": 1.0}),
    ],
    "metrics": [(lambda manager: manager.metrics(1), {"loss": 1.0})],
    "reached_preemption": [(lambda manager: manager.reached_preemption(5), False)],
    "reload": [(lambda manager: manager.reload(), None)],
    "restore": [
        (lambda manager: float(manager.restore(1, args=TARGET)["w"][0]), 1.0),
        (lambda manager: float(manager.restore()["w"][0]), 2.0),
        (lambda manager: manager.restore(99), oc.StepNotFound),
    ],
    "save": [
        (lambda manager: manager.save(3, args=state(3)), False),
        (lambda manager: manager.save(3, args=state(3), force=True), False),
        (lambda manager: manager.save(1, args=state(3), metrics={"loss": 0.0}, custom_metadata={"a": 1}), False),
    ],
    "should_save": [(lambda manager: manager.should_save(3), False)],
    "wait_until_finished": [(lambda manager: manager.wait_until_finished(), None)],
}


@pytest.fixture
def trainer(root: Path) -> Any:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with compat.CheckpointManager(root, options=options, metadata={"run": "A"}) as manager:
        for step in range(3):
            assert manager.save(step, args=state(step), metrics={"loss": float(step)})
        yield manager


def read_only(root: Path) -> compat.CheckpointManager:
    return compat.CheckpointManager(root, options=ocp.CheckpointManagerOptions(read_only=True))


def test_every_public_method_is_in_the_table() -> None:
    names = {name for name, _ in inspect.getmembers(compat.CheckpointManager) if not name.startswith("_")}
    assert names == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_no_method_of_a_read_only_manager_writes(name: str, root: Path, trainer: compat.CheckpointManager) -> None:
    before = snapshot(root)
    for call, expected in CALLS[name]:
        with read_only(root) as manager:
            if isinstance(expected, type) and issubclass(expected, Exception):
                with pytest.raises(expected):
                    call(manager)
            else:
                assert call(manager) == expected
    assert snapshot(root) == before
    assert trainer.save(3, args=state(3))  # not fenced
    assert trainer.all_steps() == [0, 1, 2, 3]


def test_a_damaged_newest_step_is_passed_over_and_left_as_it_is(root: Path, trainer: compat.CheckpointManager) -> None:
    for path in root.glob("steps/00000002/*/state/d/*"):
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    before = snapshot(root)
    with read_only(root) as manager:
        np.testing.assert_array_equal(manager.restore(args=TARGET)["w"], jnp.full(4096, 1.0))
        with pytest.raises(oc.Damaged):
            manager.restore(2, args=TARGET)
        assert manager.latest_step() == 2  # nobody has been told
    assert oc.open_run(root).restore().step == 1
    assert snapshot(root) == before
    assert trainer.save(3, args=state(3))


def test_a_read_only_manager_of_nothing_makes_nothing(root: Path) -> None:
    with read_only(root) as manager:
        assert manager.all_steps() == [] and manager.latest_step() is None
        assert manager.save(1, args=state(1)) is False
        with pytest.raises(FileNotFoundError):
            manager.restore()
    assert not root.exists()


def test_whatever_method_is_added_the_store_of_a_read_only_manager_takes_nothing(root: Path, trainer: Any) -> None:
    with read_only(root) as manager:
        storage = manager._run.store.storage
        assert isinstance(storage, ReadOnlyStorage) and manager._run._storage is storage
        with pytest.raises(oc.UsageError, match="read-only"):
            storage.create("journal/x", b"")


READER = """
import sys, jax, jax.numpy as jnp
import orchestrator.compat as ocp
root, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
options = ocp.CheckpointManagerOptions(read_only=True)
with ocp.CheckpointManager(root, options=options) as manager:
    target = ocp.args.StandardRestore({"w": jnp.zeros(4096)})
    print(float(manager.restore(args=target)["w"][0]), float(manager.restore(0, args=target)["w"][0]), end=" ")
    print(manager.save(3, args=ocp.args.StandardSave({"w": jnp.zeros(4096)}), force=True), end=" ")
    print(manager.delete(0), manager.reached_preemption(4), manager.should_save(5), manager.all_steps())
"""


@pytest.mark.jobs
def test_a_read_only_job_of_two_processes_writes_nothing_either(root: Path, trainer: compat.CheckpointManager) -> None:
    (manifest,) = root.glob("steps/00000002/*/manifest.json")
    manifest.write_bytes(b"{}")
    before = snapshot(root)
    port = str(free_port())
    command = [sys.executable, "-c", READER, str(root), port]
    processes = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    try:
        for process in processes:
            said, errors = process.communicate(timeout=90)
            assert said.splitlines()[-1:] == ["1.0 0.0 False None False False [0, 1, 2]"], errors
    finally:
        for process in processes:
            process.kill()
    assert snapshot(root) == before
    assert trainer.save(3, args=state(3))

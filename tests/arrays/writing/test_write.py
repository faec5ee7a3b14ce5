"""What is written is the state as it was when `save` was called, within the memory budget, and in bounded time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter, WriteStopped
from orchestrator.arrays.tree import flatten
from tests.support.leaf_values import same
from tests.support.runs import merge_alone


def slow_to_write() -> dict[str, Any]:
    """So many arrays that writing takes longer than getting to the next line."""
    rng = np.random.default_rng(1)
    return {str(index): rng.random((64, 1024), np.float32) for index in range(40)}


def test_numpy_arrays_changed_right_after_save_do_not_leak_into_the_checkpoint(root: Path) -> None:
    state = slow_to_write()
    wanted = {name: array.copy() for name, array in state.items()}
    with oc.Agent(root, options=oc.Options(on_save_failure="raise")) as agent:
        agent.save(1, state)
        for array in state.values():
            array.fill(-1)
        restored = agent.restore(wanted)
    assert restored is not None
    same(restored.state, wanted)


@pytest.mark.parametrize("attest", ["off", "full"])
def test_jax_arrays_donated_right_after_save_do_not_leak_into_the_checkpoint_or_its_fingerprints(
    root: Path, attest: Any
) -> None:
    wanted = slow_to_write()
    state = {name: jnp.asarray(array).copy() for name, array in wanted.items()}
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(overwrite({name: jnp.zeros_like(array) for name, array in state.items()}))  # compile first
    with oc.Agent(root, options=oc.Options(on_save_failure="raise", attest=attest)) as agent:
        agent.save(1, state)
        after = jax.block_until_ready(overwrite(state))
        for array in state.values():
            array.delete()
        others = [jnp.full_like(array, -2) for array in after.values()]  # take any memory that was given back
        restored = agent.restore(wanted)
    assert restored is not None
    same(restored.state, wanted)
    assert len(others) == len(wanted)


def test_a_state_larger_than_the_memory_budget_is_written_while_it_is_staged(tmp_path: Path) -> None:
    state = {f"w{index}": jnp.full((1 << 20,), index, jnp.uint8) for index in range(32)}
    writer = ArrayWriter(ArrayOptions(host_bytes_max=4 << 20), process=0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten(state))
    assert 0 < pending._queue.peak_bytes <= 4 << 20
    pending.finish(60)
    merge_alone(pending)
    saved = ocp.PyTreeCheckpointer().restore(tmp_path / "state")
    assert all((saved[name] == value).all() for name, value in state.items())


def test_a_write_that_fails_while_the_rest_is_staged_fails_the_save(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    writer = ArrayWriter(ArrayOptions(host_bytes_max=1 << 20), process=0)
    with pytest.raises(oc.StorageError, match=r"create .*/state/.*: ENOTDIR"):
        writer.stage(f"file://{tmp_path}/state", flatten({f"w{n}": jnp.zeros(1 << 20, jnp.uint8) for n in range(8)}))


@pytest.mark.parametrize("when_full", ["wait", "skip"])
def test_a_save_over_the_memory_budget_waits_or_is_skipped_as_asked(root: Path, when_full: Any) -> None:
    state = {f"w{index}": jnp.full((1 << 16,), index, jnp.uint8) for index in range(8)}
    options = oc.Options(async_save=False, host_bytes_max=1 << 17, when_full=when_full)
    with oc.Agent(root, options=options) as agent:
        agent.save(1, state)
        assert agent.all_steps() == ([1] if when_full == "wait" else [])
        assert agent.failures == (0 if when_full == "wait" else 1)


def test_the_boxes_of_a_receipt_are_each_shard_once_whatever_is_replicated(
    tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    value = jnp.arange(8.0 * 4).reshape(8, 4)
    state = {
        "split": jax.device_put(value, NamedSharding(mesh8, PartitionSpec("data", "model"))),
        "replicated over model": jax.device_put(value, NamedSharding(mesh8, PartitionSpec("data"))),
        "replicated": jax.device_put(value, NamedSharding(mesh8, PartitionSpec())),
        "numpy": np.zeros((2, 2)),
        "python": 3,
    }
    writer = ArrayWriter(ArrayOptions(), 0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten(state))
    pending.finish(60)
    counts = {name: len(boxes) for name, boxes in pending.boxes.items()}
    assert counts == {"split": 8, "replicated over model": 4, "replicated": 1, "numpy": 1}
    assert {(box.start, box.stop) for box in pending.boxes["replicated over model"]} == {
        ((row, 0), (row + 2, 4)) for row in (0, 2, 4, 6)
    }


def test_waiting_for_a_write_is_bounded(tmp_path: Path) -> None:
    writer = ArrayWriter(ArrayOptions(), process=0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten({"w": jnp.zeros((256, 1 << 20), jnp.uint8)}))
    with pytest.raises(oc.WaitTimeout, match=r"did not finish within 0\.001 s"):
        pending.finish(0.001)


def test_a_write_that_nobody_wants_any_more_is_given_up_and_the_next_one_is_whole(tmp_path: Path) -> None:
    writer = ArrayWriter(ArrayOptions(), process=0)
    flat = flatten({"w": jnp.zeros((64, 1 << 20), jnp.uint8)})
    with pytest.raises(WriteStopped):
        writer.stage(f"file://{tmp_path}/given-up", flat).finish(30, given_up=lambda: True)
    pending = writer.stage(f"file://{tmp_path}/whole", flat)
    pending.finish(30)
    merge_alone(pending)
    saved = ocp.PyTreeCheckpointer().restore(tmp_path / "whole")
    assert saved["w"].shape == (64, 1 << 20)

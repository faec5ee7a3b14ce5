"""Staging from accelerators, on CPU devices that are taken for some: the same programs, copies and memory kinds."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter, WriteStopped, page_locked
from orchestrator.arrays.tree import flatten
from orchestrator.arrays.writing import copy_programs, data_files, staging, write_plan
from orchestrator.arrays.writing.snapshot import Room, Snapshot
from orchestrator.arrays.writing.warm_up import regions
from tests.support.leaf_values import DTYPES, every_pattern, same

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU devices are taken for accelerators where states are staged."""
    monkeypatch.setattr(write_plan, "on_host", lambda sharding: False)


def mixed() -> dict[str, Any]:
    """Every dtype, small and large, on one device, sharded and replicated."""
    devices = jax.devices()[:2]
    mesh = Mesh(np.array(devices), ("data",))
    rows, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {name: jax.device_put(every_pattern(name), everywhere) for name in DTYPES}
    tree |= {f"{name} again": jax.device_put(every_pattern(name)[::-1], everywhere) for name in DTYPES}  # to be joined
    tree |= {f"large{at}": jax.device_put(rng.random((256, 1024), np.float32), rows) for at in range(3)}
    tree |= {f"packed{at}": jax.device_put(rng.random((4, 512 + at), np.float32), rows) for at in range(9)}
    tree |= {f"tiny{at}": jax.device_put(np.float32(at), devices[at % 2]) for at in range(9)}
    tree["replicated"] = jax.device_put(rng.random((512, 1024), np.float32), everywhere)
    tree["keys"] = jax.device_put(jax.random.split(jax.random.key(3), 4), rows)
    tree["empty"] = jax.device_put(np.zeros((0, 3), np.float32), rows)
    tree["numpy"], tree["rate"] = rng.random(9), 0.1
    return tree


def overwritten(state: dict[str, Any]) -> Any:
    """What a step that donates the state leaves of it: nothing, and memory that is used again."""
    arrays = {name: leaf for name, leaf in state.items() if isinstance(leaf, jax.Array) and name != "keys"}
    spoil = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    after = jax.block_until_ready(spoil(arrays))
    for array in arrays.values():
        array.delete()
    return after


@pytest.mark.parametrize(
    "options",
    [{}, {"attest": "full"}, {"host_bytes_max": MIB}, {"compression": True}, {"stage": "host"}],
    ids=lambda given: next(iter(given), "plain"),
)
def test_what_is_saved_from_a_snapshot_is_the_state_whatever_the_next_step_donates(
    root: Path, options: dict[str, Any]
) -> None:
    state, wanted = mixed(), mixed()
    with oc.Agent(root, options=oc.Options(**{"stage": "device", "on_save_failure": "raise"} | options)) as agent:
        assert agent.restore(like=wanted) is None
        agent._writer.close(60)  # packing is compiled from here on
        for step in (1, 2) if not options else (1,):
            assert agent.save(step, state)
            kept = overwritten(state)
            agent.wait_until_finished()
            restored = agent.restore(like=wanted)
            assert restored is not None and restored.step == step
            same(restored.state, wanted)
            state = mixed()
        del kept


def test_a_snapshot_is_of_few_arrays_and_keeps_none_on_the_device_once_it_is_on_the_host(root: Path) -> None:
    """Packing needs a program: the first save of a form goes without, unless `restore` has been told the form."""
    device = jax.devices()[0]
    state = {f"small{at}": jax.device_put(np.full(64, at, np.float32), device) for at in range(300)}
    state |= {f"medium{at}": jax.device_put(np.full(2048, at, np.float32), device) for at in range(300)}
    taken: list[Snapshot] = []
    with oc.Agent(root, options=oc.Options(stage="device", on_save_failure="raise")) as agent:
        take = agent._writer._snapshots.take

        def noted(*given: Any) -> Any:
            taken.append(take(*given))
            return taken[-1]

        agent._writer._snapshots.take = noted  # type: ignore[method-assign]
        for step in (1, 2):
            agent.save(step, state)
            agent.wait_until_finished()
            agent._writer.close(60)
        same(agent.restore(like=state).state, state)  # type: ignore[union-attr]
    first, second = taken
    assert (len(first.groups), len(first.uncopied)) == (0, 600)
    assert (len(second.groups), len(second.uncopied)) == (2, 0)
    assert not second.arrays


def test_what_cannot_be_copied_on_the_devices_stays_within_the_memory_budget(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements of less than a byte go straight to the host, where they count."""
    state = {
        str(at): jax.device_put(np.full((8, 1 << 17), at - 8).astype(jnp.int4), jax.devices()[0]) for at in range(16)
    }
    begun: list[int] = []
    copies = page_locked.copies

    def counted(shards: list[Any]) -> list[Any]:
        begun.append(sum(shard.nbytes for shard in shards))
        return copies(shards)

    monkeypatch.setattr(page_locked, "copies", counted)
    options = oc.Options(stage="device", host_bytes_max=4 * MIB, on_save_failure="raise")
    with oc.Agent(root, options=options) as agent:
        agent.save(1, state)
        same(agent.restore(like=state).state, state)  # type: ignore[union-attr]
    assert sum(begun) == 16 * MIB and max(begun) <= 4 * MIB


def test_a_write_that_is_given_up_while_it_waits_for_room_ends_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {str(at): jax.device_put(np.full((512, 512), at, np.float32), jax.devices()[0]) for at in range(8)}
    disk_works = threading.Event()
    append = data_files._LocalFile.append

    def stuck(*given: Any) -> int:
        disk_works.wait(60)
        return append(*given)

    monkeypatch.setattr(data_files._LocalFile, "append", stuck)
    before = set(threading.enumerate())
    writer = ArrayWriter(ArrayOptions(stage="device", host_bytes_max=2 * MIB), process=0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten(state))
    feed, queue = pending._feed, pending._queue
    assert feed is not None
    try:
        with pytest.raises(WriteStopped):
            pending.finish(600, given_up=lambda: queue.held_bytes == 2 * MIB)
        deadline = time.monotonic() + 10
        while feed._snapshot.arrays and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not feed._snapshot.arrays  # the devices have their memory back
    finally:
        disk_works.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread.name


class Device:
    """As much of a device as Room asks."""

    def __init__(self, **stats: int) -> None:
        self.stats: dict[str, int] | None = stats

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


class FarDevice(Device):
    def memory_stats(self) -> dict[str, int] | None:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: only supported for addressable PjRt devices")


def test_a_snapshot_fits_beside_the_most_that_training_has_needed_and_the_margin() -> None:
    device, room = Device(bytes_limit=100, bytes_in_use=20, peak_bytes_in_use=60), Room(0.1)
    assert room.fits({device: 30})
    assert not room.fits({device: 31})
    room.taken({device: 30})
    device.stats = {"bytes_limit": 100, "bytes_in_use": 20, "peak_bytes_in_use": 90}
    assert room.fits({device: 30})  # 30 of the 90 were the snapshot's
    device.stats = {"bytes_limit": 100, "bytes_in_use": 20, "peak_bytes_in_use": 95}
    assert not room.fits({device: 30})  # training needed more than the snapshot explains
    device.stats = {"bytes_limit": 100, "bytes_in_use": 20, "peak_bytes_in_use": 60}
    assert not room.fits({device: 30})  # which is not forgotten
    assert not Room(0.1).fits({device: 30, Device(): 1})  # of a device that says nothing, nothing is known
    unknown = Device()
    unknown.stats = None
    assert not Room(0.1).fits({unknown: 1})
    assert not Room(0.1).fits({FarDevice(): 1})


@pytest.mark.parametrize("size", [1, 2 * MIB, 3 * MIB, 3 << 30, (3 << 30) + 1, 5_234_567_891, 4 << 30, 1023 * MIB])
def test_regions_hold_what_is_needed_and_hardly_more_each_larger_than_the_one_before(size: int) -> None:
    found = list(regions(size))
    assert size <= sum(found) <= max(size * 33 / 32, size + 2 * MIB)
    assert found == sorted(set(found)) and all(one & (one - 1) == 0 for one in found)


def test_what_a_target_says_of_the_first_save_is_what_it_copies() -> None:
    """So that its programs are compiled before it."""
    state = {name: leaf for name, leaf in mixed().items() if name != "keys"}
    flat = flatten(state)
    plan = write_plan.plan_of(flat, 0, False, ())
    leaves = [(leaf, flat.values[number]) for number, leaf in plan.off_host]
    found = write_plan.shards_off_host(plan, staging.shards_to_write(leaves))
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        {name: leaf for name, leaf in state.items() if isinstance(leaf, jax.Array)},
    )
    assert write_plan.shards_expected(like) == [one for one in found if not one.direct]


def test_without_memory_for_a_snapshot_the_state_goes_through_the_host(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.")

    monkeypatch.setattr(copy_programs.Programs, "compiled", lambda programs, call: full)
    state, wanted = mixed(), mixed()
    with oc.Agent(root, options=oc.Options(stage="device", on_save_failure="raise")) as agent:
        agent.save(1, state)
        kept = overwritten(state)
        same(agent.restore(like=wanted).state, wanted)  # type: ignore[union-attr]
    del kept


def test_a_target_of_which_nothing_can_be_foreseen_is_restored_all_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"w": jax.device_put(np.arange(1 << 18, dtype=np.float32), jax.devices()[0])}
    abstract = NamedSharding(AbstractMesh((2,), ("data",)), PartitionSpec("data"))
    with oc.Agent(root, options=oc.Options(on_save_failure="raise")) as agent:
        monkeypatch.setattr(write_plan, "on_host", lambda sharding: not sharding.device_set)
        like = {"w": jax.ShapeDtypeStruct((1 << 18,), np.float32, sharding=abstract)}
        assert agent.restore(like) is None
        agent.save(1, state)
        with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("data",))):
            same(agent.restore(like).state, state)  # type: ignore[union-attr]

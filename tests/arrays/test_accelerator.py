"""On the machine's own accelerators, where it has any: what is saved from them is what comes back, to them or to CPUs.

Everything else in the suite runs on CPU devices; these run wherever JAX finds a GPU or TPU beside them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays.reading import host_ring
from tests.support.leaf_values import DTYPES, every_pattern, same
from tests.support.platforms import accelerators
from tests.support.runs import now, store_of

ACCELERATORS = accelerators()
pytestmark = pytest.mark.skipif(not ACCELERATORS, reason="no accelerator on this machine")
MIB = 1 << 20
REPLICATED = PartitionSpec()


def on(devices: list[Any], spec: PartitionSpec = REPLICATED, **more: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), ("data",)), spec, **more)


def here() -> list[Any]:
    """As many CPU devices."""
    return jax.devices("cpu")[: len(ACCELERATORS)]


def mixed(devices: list[Any]) -> dict[str, Any]:
    """Leaves of every kind and dtype, on `devices`."""
    rows, rng = len(devices) * 3000, np.random.default_rng(0)
    tree: dict[str, Any] = {name: jax.device_put(every_pattern(name), on(devices)) for name in DTYPES}
    tree["rows"] = jax.device_put(rng.random((rows, 1024), np.float32), on(devices, PartitionSpec("data")))
    tree["replicated"] = jax.device_put(rng.random((3000, 1024), np.float32), on(devices))
    tree["keys"] = jax.device_put(jax.random.split(jax.random.key(3), 4), on(devices))
    tree["scalar"] = jax.device_put(jnp.float32(1.5), devices[0])
    tree["empty"] = jax.device_put(np.zeros((0, 3), np.float32), on(devices))
    tree["numpy"], tree["lr"], tree["count"] = rng.random(9), 0.1, 7
    return tree


def chunks_of(root: Path) -> dict[str, str]:
    store = store_of(root)
    live = store.find(None)
    assert live is not None
    return dict(store.step(live).manifest.chunks)


@pytest.mark.parametrize("there", [True, False], ids=["to_accelerators", "to_cpus"])
def test_accelerators_and_cpus_restore_what_the_other_saved_with_the_same_chunks(
    root: Path, tmp_path: Path, there: bool
) -> None:
    source, target = (here(), ACCELERATORS) if there else (ACCELERATORS, here())
    with oc.Agent(root, options=now(attest="full")) as agent:
        assert agent.save(1, mixed(source))
        restored = agent.restore(like=mixed(target))
    assert restored is not None
    same(restored.state, mixed(here()))
    for name, leaf in mixed(target).items():
        if isinstance(leaf, jax.Array):
            assert restored.state[name].sharding == leaf.sharding, name
    with oc.Agent(tmp_path / "other", options=now()) as agent:
        assert agent.save(1, restored.state)
    assert chunks_of(tmp_path / "other") == chunks_of(root)


def spoiled_after_saving(root: Path, sharding: NamedSharding, count: int, spoil: Any, **options: Any) -> None:
    """`spoil` donates the state that it is given and makes another one."""

    def fresh() -> dict[str, Any]:
        state = {str(at): jax.device_put(np.full((512, 4096), at, np.float32), sharding) for at in range(count)}
        rows = len(ACCELERATORS)
        return state | {
            f"small{at}": jax.device_put(np.full((rows, 8 << at), at, np.float32), sharding) for at in range(12)
        }

    with oc.Agent(root, options=oc.Options(on_save_failure="raise", **options)) as agent:
        assert agent.restore(like=fresh()) is None
        for step in range(1, 4):  # the first before, the others after small arrays can be packed
            state = fresh()
            assert agent.save(step, state)
            for _ in range(3):
                state = spoil(state)
            jax.block_until_ready(state)
            agent.wait_until_finished()
            agent._writer.close(60)
            restored = agent.restore(like=state)
            assert restored is not None and restored.step == step
            same(restored.state, fresh())


@pytest.mark.parametrize(
    "options",
    [{"stage": "auto"}, {"stage": "device"}, {"stage": "host"}, {"attest": "full"}, {"host_bytes_max": 20 * MIB}],
    ids=lambda given: "-".join(map(str, *given.items())),
)
def test_a_state_donated_right_after_save_returns_cannot_leak_into_the_checkpoint(
    root: Path, options: dict[str, Any]
) -> None:
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    spoiled_after_saving(root, on(ACCELERATORS, PartitionSpec("data")), 16, spoil, **options)


def test_a_snapshot_leaves_no_memory_of_the_devices_taken(root: Path) -> None:
    state = {str(at): jax.device_put(np.full((512, 4096), at, np.float32), ACCELERATORS[0]) for at in range(32)}
    with oc.Agent(root, options=now(stage="device")) as agent:
        agent.save(1, state)
        before = ACCELERATORS[0].memory_stats()["bytes_in_use"]
        agent.save(2, state)
        assert ACCELERATORS[0].memory_stats()["bytes_in_use"] == before


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_what_is_restored_in_many_parts_through_the_same_host_memory_is_not_mixed_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    monkeypatch.setattr(host_ring, "BYTES", 12 * MIB)
    sharding = on(ACCELERATORS, PartitionSpec("data"), memory_kind=memory)
    rng = np.random.default_rng(0)
    state = {str(at): jax.device_put(rng.random((256, 1024 + at), np.float32), sharding) for at in range(40)}
    state |= {f"small{at}": jax.device_put(np.full(16 * len(ACCELERATORS), at), sharding) for at in range(300)}
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state)
        restored = agent.restore(like=state)
    assert restored is not None
    same(restored.state, state)


def test_a_state_larger_than_the_memory_budget_is_saved_from_accelerators(root: Path) -> None:
    state = {str(number): jax.device_put(np.full(MIB, number, np.float32), ACCELERATORS[0]) for number in range(16)}
    with oc.Agent(root, options=now(host_bytes_max=9 * MIB)) as agent:
        assert agent.save(1, state)
        restored = agent.restore(like=state)
    assert restored is not None
    same(restored.state, state)


def test_the_first_donating_step_after_a_restore_needs_no_memory_for_a_second_state(root: Path) -> None:
    """On CPU devices: tests/arrays/reading/test_owned_memory.py."""
    sharding = on(ACCELERATORS, PartitionSpec("data"))
    state = {str(at): jax.device_put(np.full((512, 4096), at, np.float32), sharding) for at in range(8)}
    state["small"] = jax.device_put(np.arange(16.0 * len(ACCELERATORS), dtype=np.float32), sharding)
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state)
        restored = agent.restore(like=state)
    assert restored is not None
    shards = [shard.data for leaf in restored.state.values() for shard in leaf.addressable_shards]
    held = {shard.unsafe_buffer_pointer() for shard in shards}
    assert len(held) == len(shards)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2 + 1, tree), donate_argnums=0)
    after = step(restored.state)
    assert {shard.data.unsafe_buffer_pointer() for leaf in after.values() for shard in leaf.addressable_shards} == held
    same(after, jax.tree.map(lambda leaf: leaf * 2 + 1, state))


def test_a_state_in_the_accelerators_host_memory_goes_back_to_it(root: Path) -> None:
    """Optimizer states are kept there where device memory is short."""
    sharding = on(ACCELERATORS, PartitionSpec("data"), memory_kind="pinned_host")
    state = {"mu": jax.device_put(np.random.default_rng(0).random((512, 4096), np.float32), sharding)}
    with oc.Agent(root, options=now(attest="full")) as agent:
        assert agent.save(1, state)
        restored = agent.restore(like=state)
    assert restored is not None
    same(restored.state, state)
    assert restored.state["mu"].sharding == sharding


def test_an_offloaded_state_donated_right_after_save_returns_cannot_leak_either(root: Path) -> None:
    sharding = on(ACCELERATORS, PartitionSpec("data"), memory_kind="pinned_host")

    def spoil(tree: Any) -> Any:
        there = jax.device_put(tree, on(ACCELERATORS, PartitionSpec("data"), memory_kind="device"))
        return jax.device_put(jax.tree.map(lambda leaf: leaf * 0 - 1, there), sharding)

    spoiled_after_saving(root, sharding, 8, jax.jit(spoil, donate_argnums=0, out_shardings=sharding))


A_GIGABYTE_AND_A_HALF = """
import sys, jax, numpy as np, orchestrator as oc
from orchestrator.arrays import page_locked
if sys.argv[2] == "none":
    page_locked.PINNED_HOST = "no such memory"
state = {str(at): jax.device_put(np.full((64, 1024, 1024), at, np.float32), jax.devices()[0]) for at in range(6)}
with oc.Agent(sys.argv[1], options=oc.Options(on_save_failure="raise")) as agent:
    agent.save(1, state)
    agent.wait_until_finished()
    restored = agent.restore(like=state)
assert all((np.asarray(restored.state[str(at)]) == at).all() for at in range(6))
"""


@pytest.mark.parametrize("has", ["none", "1 GB"])
def test_a_platform_without_enough_page_locked_memory_is_saved_from_all_the_same(root: Path, has: str) -> None:
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    limits = {"PYTHONPATH": os.pathsep.join(path), "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "1"}
    done = subprocess.run(
        [sys.executable, "-c", A_GIGABYTE_AND_A_HALF, str(root), has],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **limits},
    )
    assert done.returncode == 0, done.stderr

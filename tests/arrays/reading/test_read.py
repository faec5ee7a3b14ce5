"""What was saved is restored onto any sharding, as numpy, in part, or cast."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from tests.support.leaf_values import bits, came_back, same


def test_any_sharding_can_be_restored_onto_any_other(agent: oc.Agent, mesh8: jax.sharding.Mesh) -> None:
    value = jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16)
    key = jax.random.split(jax.random.key(1), 8)
    swapped = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[2:6])
    specs = [
        NamedSharding(mesh8, PartitionSpec("data", "model")),
        NamedSharding(mesh8, PartitionSpec(("data", "model"))),
        NamedSharding(mesh8, PartitionSpec(None, "data")),
        NamedSharding(mesh8, PartitionSpec()),
        NamedSharding(swapped, PartitionSpec("y", "x")),
        jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    ]
    for saved in specs:
        rows = saved if saved != specs[2] else specs[3]  # a one-dimensional array has no second axis to split
        rows = specs[0].update(spec=PartitionSpec("data")) if isinstance(saved, NamedSharding) else rows
        state = {"w": jax.device_put(value, saved), "key": jax.device_put(key, rows)}
        step = (agent.latest_step() or 0) + 1
        agent.save(step, state)
        for wanted in specs:
            like = {
                "w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=wanted),
                "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rows),
            }
            restored = agent.restore(like, step=step)
            assert restored is not None
            assert restored.state["w"].sharding == wanted
            same(restored.state, {"w": value, "key": key})


def test_a_target_of_numpy_brings_jax_arrays_back_as_numpy_and_the_other_way_round(agent: oc.Agent) -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    same(came_back(agent, {"w": jnp.asarray(value)}, like={"w": np.zeros_like(value)}), {"w": value})
    same(came_back(agent, {"w": value}, like={"w": jnp.zeros((2, 3))}), {"w": jnp.asarray(value)})


def test_without_a_target_everything_comes_back_as_numpy_in_nested_dicts(agent: oc.Agent, root: Path) -> None:
    agent.save(1, {"a": [jnp.ones(2), {"b": 3}], "key": jax.random.key(1), "none": None})
    state = oc.open_run(root).restore().state
    assert state["a"]["1"] == {"b": 3} and state["none"] is None
    assert bits(state["a"]["0"]) == bits(np.ones(2, np.float32))
    assert bits(state["key"]) == bits(np.asarray(jax.random.key_data(jax.random.key(1))))


def test_partial_reads_the_subtree_that_is_asked_for(agent: oc.Agent) -> None:
    state = {"params": {"w": jnp.ones(2), "b": jnp.zeros(2)}, "opt": [jnp.ones(5), 3]}
    same(came_back(agent, state, like={"params": {"w": jnp.zeros(2)}}, partial=True), {"params": {"w": jnp.ones(2)}})


def test_cast_converts_as_astype_does(agent: oc.Agent) -> None:
    value = jnp.linspace(-3, 3, 7)
    like = {"w": jax.ShapeDtypeStruct((7,), jnp.bfloat16)}
    same(came_back(agent, {"w": value}, like=like, cast=True), {"w": value.astype(jnp.bfloat16)})


def test_a_target_that_does_not_fit_is_rejected_before_any_array_is_read(agent: oc.Agent, root: Path) -> None:
    agent.save(1, {"w": jnp.ones((64, 64))})
    for file in root.glob("steps/*/*/state/**/d/*"):
        file.write_bytes(bytes(len(file.read_bytes())))  # of the same size: whoever reads it meets damage
    with pytest.raises(oc.Mismatch, match=r"w: checkpoint f32\[64,64\], target f32\[32\]"):
        agent.restore({"w": jnp.ones(32)})
    with pytest.raises(oc.Damaged):
        agent.restore({"w": jnp.ones((64, 64))}, step=1)

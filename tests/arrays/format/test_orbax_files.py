"""A step is an ordinary Orbax checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from tests.support.leaf_values import bits, every_pattern


def test_plain_orbax_loads_a_step_with_equal_values(agent: oc.Agent, root: Path, mesh8: jax.sharding.Mesh) -> None:
    sharding = NamedSharding(mesh8, PartitionSpec("data", "model"))
    state = {
        "w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding),
        "half": jnp.asarray(every_pattern("bfloat16")),
        "nested": [np.arange(3), {"count": 7, "rate": 0.25, "name": "adam"}],
        "none": None,
    }
    agent.save(1, state)
    (directory,) = root.glob("steps/*/*/state")
    arguments = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray) if hasattr(leaf, "shape") else ocp.RestoreArgs(), state
    )
    plain = ocp.PyTreeCheckpointer().restore(str(directory), restore_args=arguments)
    for name in ("w", "half"):
        assert bits(np.asarray(plain[name])) == bits(np.asarray(state[name]))
    assert bits(np.asarray(plain["nested"][0])) == bits(np.arange(3))
    assert plain["nested"][1] == {"count": 7, "rate": 0.25, "name": "adam"}
    onto_mesh = ocp.args.PyTreeRestore(
        item={"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)},
        restore_args={"w": ocp.ArrayRestoreArgs(sharding=sharding)},
        partial_restore=True,
    )
    assert bits(ocp.PyTreeCheckpointer().restore(str(directory), args=onto_mesh)["w"]) == bits(state["w"])

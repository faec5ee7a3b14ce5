"""Whole runs, which ask nothing of a server that Cloud Storage does not offer. By default in the project's emulator;
`make test-gcs-servers` runs them, and the conformance suite, on servers that nobody here wrote (TEST_GCS_SERVER)."""

from __future__ import annotations

import json
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.cli.main import main as cli
from tests.support.fakes import another_host
from tests.support.gcs import BUCKET, new_root, server


def state(mesh: jax.sharding.Mesh, step: int) -> dict[str, jax.Array]:
    """Chunks of their own in data files, small ones in the tree, and an empty array."""
    rng = np.random.default_rng(step)
    large = rng.random((64, 4096), np.float32)
    return {
        "large": jax.device_put(large, NamedSharding(mesh, PartitionSpec("data"))),
        "small": jnp.arange(7.0) + step,
        "none": jnp.zeros((0, 3)),
    }


def like(mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state(mesh, 0))
    return {**shapes, "large": jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=sharding)}


@pytest.mark.parametrize("compression", [False, True])
def test_a_run_saves_comes_back_retires_and_fences(compression: bool, capsys: pytest.CaptureFixture[str]) -> None:
    four, two = (jax.make_mesh((count,), ("data",), devices=jax.devices()[:count]) for count in (4, 2))
    options = oc.Options(async_save=False, on_save_failure="raise", compression=compression)
    root = new_root()
    older = oc.Agent(root, keep=oc.last(2), options=options, rendezvous=another_host())
    for step in (1, 2, 3):
        assert older.save(step, state(four, step), process_state=b"", extra={"step": step})
    with oc.Agent(root, keep=oc.last(2), options=options) as agent:
        restored = agent.restore(like(two))
        assert restored and restored.step == 3 and restored.extra["step"] == 3 and restored.process_states == {0: b""}
        for name, leaf in state(four, 3).items():
            np.testing.assert_array_equal(np.asarray(restored.state[name]), np.asarray(leaf))
        with pytest.raises(oc.Fenced):
            older.save(4, state(four, 4))
        assert agent.save(4, state(two, 4))
        assert agent.all_steps() == [3, 4]
    prefix = quote(root.removeprefix(f"gs://{BUCKET}/") + "/steps/", safe="")
    listed = json.loads(server().ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={prefix}")[2])["items"]
    assert {one["name"].split("/steps/")[1].split("/")[0] for one in listed} == {"00000003", "00000004"}  # deleted
    assert cli(["orchestrator", "verify", root, "--all"]) == 0
    assert cli(["orchestrator", "verify", root, "--all", "--by_store"]) == 0
    capsys.readouterr()

"""Attest, end to end: fingerprints survive any mesh, wrong ones are caught, replicas that drift apart stop a save."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator import arrays
from orchestrator.job.read_step import ReadOptions, read_step
from tests.support.processes import job
from tests.support.runs import journal_of, kinds, now, store_of
from tests.support.snapshots import snapshot

pytestmark = pytest.mark.jobs

SPECS = [PartitionSpec(), PartitionSpec("data"), PartitionSpec("model", "data"), PartitionSpec(None, ("data", "model"))]


def fingerprints(root: Path, step: int) -> dict[str, str]:
    store = store_of(root)
    live = store.find(step)
    assert live is not None
    return store.step(live).manifest.fingerprints


def sharded(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> Any:
    value = np.random.default_rng(0).random((8, 8), np.float32)
    keys = jax.random.split(jax.random.key(3), 8)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return {
        "w": jax.device_put(value, NamedSharding(mesh, spec)),
        "keys": jax.device_put(keys, rows),
        "numpy": value.astype(np.float64),
        "scalar": jnp.bfloat16(1.5),
        "empty": np.zeros((0, 3)),
        "lr": 0.1,
    }


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_kind_of_leaf_is_attested_and_restored_on_any_sharding(
    root: Path, mesh8: jax.sharding.Mesh, spec: PartitionSpec
) -> None:
    with oc.Agent(root, options=now(attest="full")) as agent:
        assert agent.save(1, sharded(mesh8, SPECS[1]))
        wanted = sharded(mesh8, spec)
        restored = agent.restore(wanted)
        assert restored is not None and agent.save(2, restored.state)
    assert fingerprints(root, 1).keys() == {"w", "keys", "numpy", "scalar"}
    assert fingerprints(root, 1) == fingerprints(root, 2)
    reader = oc.open_run(root)
    assert np.array_equal(reader.restore(attest=True).state["w"], np.asarray(wanted["w"]))
    cast = {"w": np.zeros((8, 8), np.float16)}  # other bits: nothing to compare with
    assert reader.restore(cast, partial=True, cast=True, attest=True).state["w"].dtype == np.float16


def test_an_axis_swapped_while_reading_is_caught_though_every_checksum_is_right(
    root: Path, mesh8: jax.sharding.Mesh
) -> None:
    state = sharded(mesh8, SPECS[2])
    with oc.Agent(root, options=now(attest="save")) as agent:
        agent.save(1, state)

    def swapped(*arguments: Any) -> list[Any]:
        loaded = arrays.load(*arguments)
        return [value.T if getattr(value, "shape", ()) == (8, 8) else value for value in loaded]

    store = store_of(root)
    live = store.find(1)
    assert live is not None
    before = snapshot(root)
    read_step(store, live, state, ReadOptions(reader=swapped))  # what plain checksums let through
    said = r"numpy: its fingerprint after restoring .* at the save it was .* the step is not damaged"
    with pytest.raises(oc.Unavailable, match=said):
        read_step(store, live, state, ReadOptions(reader=swapped, attest=True))
    assert snapshot(root) == before


def test_a_replica_that_differs_by_one_bit_aborts_the_save_and_training_goes_on(
    root: Path, mesh8: jax.sharding.Mesh
) -> None:
    array = jax.device_put(np.arange(16, dtype=np.float32), NamedSharding(mesh8, PartitionSpec("model")))
    parts = [np.array(shard.data) for shard in array.addressable_shards]
    parts[5].view(np.uint32)[3] ^= 1
    devices = [shard.device for shard in array.addressable_shards]
    wrong = jax.make_array_from_single_device_arrays(
        array.shape, array.sharding, [jax.device_put(part, one) for part, one in zip(parts, devices, strict=True)]
    )
    with oc.Agent(root, options=oc.Options(async_save=False, attest="save")) as agent:
        assert agent.save(0, {"w": array})
        agent.save(1, {"w": wrong})
        assert (agent.failures, agent.all_steps()) == (1, [0])
        assert agent.save(2, {"w": array})
    (aborted,) = (head.event for head in journal_of(root) if head.event.kind == "aborted")
    assert "w[8:16]: replicas disagree: process 0 (" in aborted.reason
    assert "devices 1, 3, 7: " in aborted.reason and " device 5: " in aborted.reason
    assert oc.open_run(root).all_steps() == [0, 2]


def test_without_attest_nothing_is_computed_recorded_or_compared(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jnp.zeros(4)})
    assert fingerprints(root, 1) == {}
    assert oc.open_run(root).restore(attest=True).step == 1
    with pytest.raises(oc.UsageError, match="expected 'off', 'save' or 'full'"):
        oc.Options(attest="on")  # type: ignore[arg-type]


def test_a_restored_step_is_trusted_most_and_stays(root: Path) -> None:
    with oc.Agent(root, options=now(), keep=oc.last(1)) as agent:
        agent.save(1, {"w": jnp.zeros(4)})
    with oc.Agent(root, options=now(), keep=oc.last(1)) as agent:
        assert agent.restore({"w": jnp.zeros(4)}) is not None
        for step in (2, 3):
            agent.save(step, {"w": jnp.zeros(4)})
        assert agent.all_steps() == [1, 3]
    assert kinds(root).count("restored") == 1
    trust = {live.step: live.trust for live in store_of(root).require_head().live}
    assert trust == {1: "restored", 3: "committed"}
    assert subprocess.run([sys.executable, "-m", "orchestrator.cli", "verify", root, "--all"]).returncode == 0
    trust = {live.step: live.trust for live in store_of(root).require_head().live}
    assert trust == {1: "restored", 3: "verified"}  # it never goes back


# On several hosts.


def restored_here(root: Path, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> None:
    """The newest step of a state_job's run, restored by this one process, and saved again one step later."""
    at = NamedSharding(mesh, spec)
    replicated = NamedSharding(mesh, PartitionSpec())
    like = {
        "w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=at),
        "bf16": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=at),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=replicated),
        "host_local": jnp.float32(0),
        "numpy": np.arange(3),
        "count": 0,
    }
    with oc.Agent(root, options=now(attest="full")) as agent:
        restored = agent.restore(like)
        assert restored is not None and restored.step == max(agent.all_steps())
        agent.save(restored.step + 1, restored.state)


MESHES: list[tuple[int, int, dict[str, Any]]] = [  # processes, devices of each, arguments
    (2, 1, {"mesh": "1x2"}),
    (2, 2, {"mesh": "4x1", "spec": "r"}),
    (4, 1, {"mesh": "2x2", "spec": "md"}),
]


@pytest.mark.slow
def test_fingerprints_are_the_same_on_six_meshes_and_process_counts(tmp_path: Path, mesh8: jax.sharding.Mesh) -> None:
    root = tmp_path / "run"
    plain: dict[str, Any] = {"attest": "full", "keep": 99}
    with job(2, 2, root, tmp_path / "first", mesh="2x2", steps=1, **plain) as running:
        assert running.wait(60) == [0, 0], running.story()
    for number, (count, devices, arguments) in enumerate(MESHES):
        with job(count, devices, root, tmp_path / f"{number}", resave=1, **plain, **arguments) as running:
            assert running.wait(90) == [0] * count, running.story()
            for process in range(count):
                assert running.said(process, "restored")[0]["step"] == number, running.story()
    restored_here(root, mesh8, PartitionSpec("model", "data"))
    restored_here(root, mesh8, PartitionSpec(("data", "model")))
    restored_here(root, jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1]), PartitionSpec())
    known = [fingerprints(root, step) for step in range(7)]
    assert known[0].keys() == {"w", "bf16", "bias", "numpy", "host_local"}
    assert all(one == known[0] for one in known)
    with job(2, 2, root, tmp_path / "swapped", mesh="4x1", swap=1, **plain) as running:
        assert running.wait(60) == [1, 1], running.story()
        for process in range(2):
            (error,) = running.said(process, "error")
            assert "w: its fingerprint after restoring (replica 0 over all processes) is" in error["text"]


@pytest.mark.slow
def test_a_wrong_replica_on_one_host_and_damage_to_the_latest_two_of_five(tmp_path: Path) -> None:
    root = tmp_path / "run"
    plain: dict[str, Any] = {"attest": "full", "keep": 9, "mesh": "4x1"}
    with job(2, 2, root, tmp_path / "first", steps=6, flip="1@3", **plain) as running:
        assert running.wait(60) == [0, 0], running.story()
        assert running.said(1, "done")[0]["failures"] == 1
    (aborted,) = (head.event for head in journal_of(root) if head.event.kind == "aborted")
    assert aborted.step == 3
    assert re.search(
        r"bias\[0:8\]: replicas disagree: process 0 \(host-0\) devices \d+, \d+, process 1 \(host-1\) device \d+: "
        r"[0-9a-f]{32} but process 1 \(host-1\) device \d+: [0-9a-f]{32}$",
        aborted.reason,
    ), aborted.reason
    steps = oc.open_run(root).all_steps()
    assert steps == [0, 1, 2, 4, 5]
    for file in (root / "steps" / "00000005").rglob("d/*"):
        body = bytearray(file.read_bytes())
        body[::50] = bytes(byte ^ 1 for byte in body[::50])
        file.write_bytes(body)
    (root / "steps" / "00000004" / "e0001-a01" / "manifest.json").unlink()
    with job(2, 1, root, tmp_path / "second", attest="full", keep=9, mesh="1x2") as running:
        assert running.wait(60) == [0, 0], running.story()
        for process in range(2):
            (restored,) = running.said(process, "restored")
            assert (restored["step"], restored["wrong"]) == (2, [])
    log = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "log", root, "--last=3", "--json"], capture_output=True, check=True
    )
    newest, before, restored = (entry["event"] for entry in json.loads(log.stdout))
    assert [(one["kind"], one["step"]) for one in (newest, before, restored)] == [
        ("quarantined", 5),
        ("quarantined", 4),
        ("restored", 2),
    ]
    assert re.match(r"process \d \(host-\d\): .*steps/00000005", newest["reason"])
    assert "manifest.json: is missing" in before["reason"]

"""The on-disk format is written down well enough: a reader made from the page alone reads the same as the package."""

from __future__ import annotations

import ast
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.cli.main import main
from tests.proof import independent_reader
from tests.support.runs import now

READER = Path(independent_reader.__file__)


METRICS = {"loss": 0.5, "best": float("inf"), "worst": -float("inf")}
EXTRA: dict[str, Any] = {"a": [1], "best": [float("inf")], "mine": {"$number": "NaN"}, "deep": {"$$number": 3}}


def state(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    grid = NamedSharding(mesh, PartitionSpec("data", "model"))
    return {
        "w": jax.device_put(jnp.arange(4096.0).reshape(64, 64), grid),
        "low": [jnp.arange(8, dtype=jnp.int4), jnp.ones((4, 2), jnp.bfloat16), jnp.ones(4, jnp.float8_e4m3)],
        "scalar": jnp.float32(2.5),
        "keys": jax.random.split(jax.random.key(1), 3),
        "numpy": {"a": np.arange(6).reshape(2, 3), "b": np.float64(1.5)},
        "nothing": jnp.zeros((0, 3)),
        "plain": (3, 2.5, 1 + 2j, True, "text", b"\x00\xff", None, (), [], {}),
    }


def flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(tree, dict) and tree:
        return {key: value for name, each in tree.items() for key, value in flat(each, (*path, name)).items()}
    return {path: tree}


def assert_reads_the_same(root: Path) -> independent_reader.Step:
    step = independent_reader.Step(root)  # type: ignore[no-untyped-call]
    run = oc.open_run(root).restore()
    ours, theirs = flat(run.state), step.read()  # type: ignore[no-untyped-call]
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        if isinstance(value, np.ndarray | np.generic):
            assert (value.dtype, value.shape) == (theirs[path].dtype, theirs[path].shape), path
            assert value.tobytes() == theirs[path].tobytes(), path
        else:
            assert theirs[path] == value and type(theirs[path]) is type(value), path
    assert (step.live["step"], step.metrics, step.process_states) == (run.step, run.metrics, run.process_states)
    return step


@pytest.mark.parametrize("compression", [False, True])
def test_every_kind_of_leaf(compression: bool, root: Path, mesh8: jax.sharding.Mesh) -> None:
    with oc.Agent(root, options=now(compression=compression)) as agent:
        agent.save(1, {"w": jnp.zeros(1)}, force=True)
    with oc.Agent(root, options=now(compression=compression, other_tree=True)) as agent:
        agent.save(2, state(mesh8), metrics=METRICS, extra=EXTRA, process_state=b"\x00here")
    step = assert_reads_the_same(root)
    assert step.extra == EXTRA


def test_the_checksums_of_parts_of_large_chunks(root: Path) -> None:
    large = {"w": jnp.arange(700_000.0), "small": jnp.ones(70_000), "both": np.ones((3, 90_000), np.int8)}
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, large)
    step = independent_reader.Step(root)  # type: ignore[no-untyped-call]
    parts = step.parts()  # type: ignore[no-untyped-call]
    assert parts == {"w/c/0": True, "small/c/0": True, "both/c/0/0": True}


def test_an_adopted_run(root: Path, mesh8: jax.sharding.Mesh) -> None:
    plain = {name: value for name, value in state(mesh8).items() if name in ("w", "keys", "scalar")}
    items = {"state": ocp.args.StandardSave(plain), "ema": ocp.args.StandardSave({"w": plain["w"]})}
    with ocp.CheckpointManager(root) as manager:
        manager.save(4, args=ocp.args.Composite(**items))
    assert main(["orchestrator", "adopt", str(root)]) == 0
    assert_reads_the_same(root)


def test_it_notices_damage_and_skips_what_is_quarantined(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step in (1, 2):
            agent.save(step, {"w": jnp.full(4, step)})
    assert main(["orchestrator", "quarantine", str(root), "--step=2", "--reason=x"]) == 0
    assert assert_reads_the_same(root).live["step"] == 1
    (intent,) = root.glob("steps/00000001/*/intent.json")
    intent.write_bytes(intent.read_bytes().replace(b'"kind":"array"', b'"kind":"numpy"'))
    with pytest.raises(AssertionError, match="damaged"):
        independent_reader.Step(root)  # type: ignore[no-untyped-call]


def test_it_owes_nothing_to_the_package_and_runs_alone(root: Path) -> None:
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(READER.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not any(name.startswith(("orchestrator", "jax", "orbax")) for name in imported), imported
    assert len(READER.read_text().splitlines()) < 150
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jnp.arange(4.0)})
    done = subprocess.run([sys.executable, READER, root, "1"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"w {zlib.crc32(np.arange(4, dtype=np.float32).tobytes()):08x}\n"

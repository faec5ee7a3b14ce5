"""`orchestrator adopt` from Cloud Storage: what Orbax has written there, copied to this host or within the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator import compat
from orchestrator.cli.main import main
from orchestrator.storage import gcs_objects, open_storage
from orchestrator.storage.gcs import GcsStorage
from tests.support import gcs
from tests.support.adopting import adopt, assert_same


def state(mesh: jax.sharding.Mesh, step: int) -> dict[str, Any]:
    rows = NamedSharding(mesh, PartitionSpec("data", "model"))
    return {
        "w": jax.device_put(jnp.arange(32.0).reshape(8, 4) + step, rows),
        "b": jnp.full(3, step, jnp.bfloat16),
        "key": jax.random.key(step),
        "layers": [np.arange(step, step + 3)],
        "step": step,
        "nothing": None,
    }


def objects(url: str) -> dict[str, str]:
    """What is stored there: key -> CRC-32C."""
    storage = open_storage(url)
    found = {}
    for entry in storage.list(""):
        measured = storage.measure(entry.key)
        assert measured is not None
        found[entry.key] = measured.crc32c
    return found


@pytest.fixture(scope="module")
def written(mesh8: jax.sharding.Mesh) -> str:
    """Steps 10 and 20, an array in a directory of its own in 20; 30, whose save has not ended; root metadata."""
    url = gcs.new_root()
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"])
    for steps, handler in (((10,), None), ((20, 30), ocp.PyTreeCheckpointHandler(use_ocdbt=False))):
        more = {} if handler is None else {"item_handlers": handler}
        kind = ocp.args.StandardSave if handler is None else ocp.args.PyTreeSave
        with ocp.CheckpointManager(url, options=options, **more) as manager:
            for step in steps:
                manager.save(
                    step, args=kind(state(mesh8, step)), metrics={"loss": 1 / step}, custom_metadata={"n": step}
                )
    storage = open_storage(url)
    storage.delete("30/commit_success.txt")
    storage.create("metadata/_ROOT_METADATA", json.dumps({"custom_metadata": {"team": "x"}}).encode())
    return url


@pytest.fixture
def theirs(written: str) -> Iterator[str]:
    """Of each test's own: it may adopt in place."""
    source, url = open_storage(written), gcs.new_root()
    target = open_storage(url)
    assert isinstance(source, GcsStorage) and isinstance(target, GcsStorage)
    for entry in source.list(""):
        gcs_objects.copy(source, entry.key, target, entry.key, lambda count: None)
    yield url


@contextmanager
def rules(*each: Mapping[str, Any]) -> Iterator[None]:
    gcs.emulator().set_rules("adopt", *each)
    try:
        yield
    finally:
        gcs.emulator().set_rules("adopt")


@pytest.mark.parametrize("where", ["on this host", "elsewhere in the store", "in place"])
def test_what_orbax_wrote_into_a_bucket_is_listed_then_adopted_and_leaf_identical(
    where: str, theirs: str, tmp_path: Path, mesh8: jax.sharding.Mesh, capsys: pytest.CaptureFixture[str]
) -> None:
    root = {"on this host": str(tmp_path / "run"), "elsewhere in the store": gcs.new_root(), "in place": theirs}[where]
    before = objects(theirs)
    if where == "in place":
        with pytest.raises(oc.UsageError, match=f"orchestrator adopt {theirs}"), oc.Agent(root) as agent:
            agent.restore(state(mesh8, 0))
    assert adopt(root, f"--from={theirs}", "--dry_run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    found = {each["step"]: (each["verdict"], each["bytes"] > 0) for each in plan["found"]}
    assert found == {10: ("adopt", True), 20: ("adopt", True), 30: ("unfinished", False)} and plan["copied"]
    assert "has not finished it" in plan["found"][2]["why"]
    assert objects(theirs) == before and not Path(tmp_path / "run").exists()

    assert adopt(root, f"--from={theirs}") == 0
    said = capsys.readouterr().out
    assert "adopted 10, 20" in said and "step 30: left: " in said
    after = objects(theirs)
    assert {key: after[key] for key in before} == before, "Orbax's own objects are as they were"
    assert main(["orchestrator", "verify", root, "--all"]) == 0
    other = jax.make_mesh((2, 4), ("data", "model"))
    if where == "in place":
        with (
            pytest.raises(oc.UsageError, match=r"holds 30.*delete what Orbax has not finished"),
            oc.Agent(root) as agent,
        ):
            agent.restore(state(other, 0))
        for key in [key for key in before if key.startswith("30/")]:
            open_storage(theirs).delete(key)
    with oc.Agent(root) as agent:
        for step in (10, 20):
            restored = agent.restore(state(other, 0), step=step)
            assert restored is not None and restored.metrics == {"loss": 1 / step}
            assert restored.extra["orbax"]["custom_metadata"] == {"n": step}
            assert_same(restored.state, state(other, step))
        agent.save(21, state(other, 21))
        agent.wait_until_finished()
        assert agent.failures == 0 and agent.all_steps() == [10, 20, 21]
    with compat.CheckpointManager(root) as moved:
        assert moved.metadata().custom_metadata == {"team": "x"}
        assert_same(moved.restore(20, args=ocp.args.StandardRestore(state(other, 0))), state(other, 20))


@pytest.mark.parametrize("in_store", [False, True], ids=["to this host", "within the store"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_copy_that_breaks_off_leaves_whole_steps_and_adopting_again_goes_on(
    step: int, in_store: bool, theirs: str, tmp_path: Path
) -> None:
    root = gcs.new_root() if in_store else str(tmp_path / "run")
    name = (
        f"{theirs.removeprefix(f'gs://{gcs.BUCKET}/')}/{step}/default/commit_success.txt"  # only copied, never parsed
    )
    with rules({"name": name, "operations": ["media", "copy"], "value": 403}):
        assert adopt(root, f"--from={theirs}") == 1
    if step == 20:
        assert oc.open_run(root).all_steps() == [10]
    assert adopt(root, f"--from={theirs}") == 0
    assert oc.open_run(root).all_steps() == [10, 20]
    assert main(["orchestrator", "verify", root, "--all"]) == 0
    assert main(["orchestrator", "gc", root]) == 0  # what the first has left
    attempts = {entry.key.split("/")[1:3][0] for entry in open_storage(root).list("steps/")}
    assert attempts == {"00000010", "00000020"}


def test_what_cannot_be_adopted_is_said_and_nothing_is_written(
    theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "theirs"
    with ocp.CheckpointManager(local) as manager:
        manager.save(1, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
    open_storage(theirs).create("20/assets/vocabulary.bin", b"x")
    empty, root = gcs.new_root(), gcs.new_root()
    for arguments, said in (
        ([root, f"--from={local}"], "copy the steps there first"),
        ([root, f"--from={empty}"], "no steps of an Orbax CheckpointManager in it"),
        ([root, f"--from={theirs}"], "item 'assets' is neither"),
        ([root, f"--from={theirs}", "--steps=30"], "has not finished it"),
        ([root, f"--from={theirs}", "--steps=31"], "no step 31 in it"),
        ([root, "--from=s3://bucket/run"], "no storage for s3://"),
        ([tmp_path / "run", f"--from={theirs}/30"], "has not finished it"),
    ):
        assert adopt(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    assert not objects(root) and not (tmp_path / "run").exists()
    assert adopt(root, f"--from={theirs}/10") == 0, "one checkpoint of a store"
    assert oc.open_run(root).all_steps() == [10]


def test_an_object_of_many_pieces_arrives_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs_objects, "PIECE_BYTES", 1000)
    storage = open_storage(gcs.new_root())
    assert isinstance(storage, GcsStorage)
    for size in (0, 1, 999, 1000, 1001, 5000):
        body = bytes(index % 251 for index in range(size))
        storage.create(f"o{size}", body)
        assert b"".join(gcs_objects.pieces(storage, f"o{size}")) == body
    with rules({"name": "o5000", "kind": "flip"}), pytest.raises(oc.StorageError, match="arrived with crc32c"):
        list(gcs_objects.pieces(storage, "o5000"))
    reading = gcs_objects.pieces(storage, "o5000")
    first = next(reading)
    storage.delete("o5000")
    storage.create("o5000", b"x" * 5000)  # somebody saves there
    assert len(first) == 1000
    with pytest.raises(oc.StorageError, match="arrived with crc32c"):
        list(reading)


def test_a_copy_for_which_there_is_no_room_is_not_begun(
    theirs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    assert adopt(tmp_path / "run", f"--from={theirs}") == 1
    assert "10 are free; nothing was" in capsys.readouterr().err and not (tmp_path / "run").exists()

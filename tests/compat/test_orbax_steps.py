"""Directories of Orbax's as they are met: of any version, gone on with, malformed, linked. Each is adopted, or rejected
with the way out; none is taken for a new run, and nothing is passed over."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator import compat
from orchestrator.cli.main import main
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_directory import unadopted
from orchestrator.storage import open_storage
from orchestrator.storage.memory import MemoryStorage
from tests.support.builders import head, live

SAVE = ocp.args.StandardSave
DEEP = "[" * 100_000


def orbax(root: Path, *steps: int, metrics: dict[str, float] | None = None) -> Path:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, best_fn=lambda each: each["loss"])
    with ocp.CheckpointManager(root, options=options) as manager:
        for step in steps:
            state = {"w": jnp.full(4, float(step)), "l": [np.arange(3)], "text": "é"}
            meta = ocp.args.JsonSave({"best": math.inf, "$number": "NaN"})
            args = ocp.args.Composite(default=ocp.args.PyTreeSave(state), meta=meta)
            manager.save(step, args=args, metrics=metrics, custom_metadata={"n": step}, force=True)
    return root


def of_version_0_4(root: Path, *steps: int, prefix: str = "") -> Path:
    """As Orbax 0.4.8 leaves it, with OCDBT: compared by hand with what it wrote."""
    orbax(root, *steps)
    for step in steps:
        shutil.move(root / str(step), root / f"{prefix}{step}")
        there = root / f"{prefix}{step}"
        for path in there.rglob("*"):
            if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
                path.unlink()
        shutil.rmtree(there / "default" / "array_metadatas")
        shutil.rmtree(there / "meta")
        described = json.loads((there / "default" / "_METADATA").read_text())
        kept = {"tree_metadata": described["tree_metadata"], "use_zarr3": False}
        (there / "default" / "_METADATA").write_text(json.dumps(kept))
        (there / "default" / "checkpoint").write_bytes(b"\x81\xa1w\xc0")
    return root


def snapshot(root: Path) -> dict[Path, bytes]:
    """Everything below `root`, links not followed."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def run_adopt(*arguments: object) -> int:
    return main(["orchestrator", "adopt", *map(str, arguments)])


def rejection(root: Path) -> str | None:
    store = JournalStore(open_storage(root), writer="test")
    return unadopted(store, store.head())


def rejected_unchanged(root: Path, *said: str) -> None:
    """Neither manager nor reader opens it, and nothing was written."""
    before = snapshot(root)
    for read_only in (False, True):
        options = ocp.CheckpointManagerOptions(read_only=read_only)
        with pytest.raises(oc.UsageError) as caught:
            compat.CheckpointManager(root, options=options)
        for text in said:
            assert text in str(caught.value)
    assert rejection(root) == str(caught.value)
    assert snapshot(root) == before


# Adopted.


@pytest.mark.parametrize("prefix", ["", "ckpt_", "000"])
def test_a_directory_of_an_old_orbax_is_rejected_until_adopted_and_then_restored(root: Path, prefix: str) -> None:
    of_version_0_4(root, 10, 20, prefix=prefix)
    rejected_unchanged(root, "holds 2 steps of Orbax's own (newest 20)", f"orchestrator adopt {root}")
    assert run_adopt(root) == 0
    with compat.CheckpointManager(root) as manager:
        assert manager.all_steps() == [10, 20]
        assert manager.metadata(20).commit_timestamp_nsecs > 1e18
        assert float(manager.restore()["w"][0]) == 20.0
        manager.save(30, args=SAVE({"w": jnp.ones(4)}))
    assert rejection(root) is None


def test_numbers_that_json_has_no_word_for_are_adopted(root: Path) -> None:
    orbax(root, 1, 2, metrics={"loss": math.nan, "best": -math.inf, "n": 3})
    assert run_adopt(root) == 0
    assert main(["orchestrator", "ls", str(root)]) == 0
    restored = oc.open_run(root).restore()
    assert math.isnan(restored.metrics["loss"]) and restored.metrics["best"] == -math.inf
    assert restored.extra["orbax"]["json"] == {"meta": {"best": math.inf, "$number": "NaN"}}
    with compat.CheckpointManager(root) as manager:
        assert manager.metrics(2) == restored.metrics | {"loss": pytest.approx(math.nan, nan_ok=True)}
        assert manager.restore(2)["meta"] == {"best": math.inf, "$number": "NaN"}


def test_metrics_that_are_no_numbers_of_ours_are_kept_beside_them(root: Path) -> None:
    orbax(root, 1, metrics={"loss": 1.0})
    odd = {"huge": 10**400, "tree": {"a": [1.0, math.inf]}, "text": "x", "none": None}
    (root / "1" / "metrics" / "metrics").write_text(json.dumps({"loss": 2, "yes": True, **odd}))
    assert run_adopt(root) == 0
    restored = oc.open_run(root).restore()
    assert restored.metrics == {"loss": 2.0, "yes": 1.0}
    assert restored.extra["orbax"]["json"]["metrics"] == odd


# Rejected, with the way out.


def test_an_adopted_directory_in_which_orbax_went_on_is_rejected_until_it_is_adopted_again(root: Path) -> None:
    orbax(root, 1)
    assert run_adopt(root) == 0 and rejection(root) is None
    orbax(root, 2, 3)
    rejected_unchanged(root, "holds 2 steps of Orbax's own (newest 3)", f"orchestrator adopt {root}")
    assert run_adopt(root) == 0
    with compat.CheckpointManager(root) as manager:
        assert manager.all_steps() == [1, 2, 3]


def test_where_both_went_on_the_user_chooses(root: Path, tmp_path: Path) -> None:
    orbax(root, 1)
    assert run_adopt(root) == 0
    with compat.CheckpointManager(root) as manager:
        manager.save(50, args=SAVE({"w": jnp.ones(4)}))
    orbax(root, 2)
    rejected_unchanged(root, "newest 2", "the run has step 50", f"orchestrator adopt OTHER_ROOT --from={root}")
    assert run_adopt(tmp_path / "other", f"--from={root}") == 0
    assert oc.open_run(tmp_path / "other").all_steps() == [1, 2]
    shutil.move(root / "2", tmp_path / "2")
    with compat.CheckpointManager(root) as manager:
        assert manager.latest_step() == 50


def test_orbaxs_directories_of_adopted_and_retired_steps_reject_nobody(root: Path) -> None:
    orbax(root, 1, 2, 3)
    assert run_adopt(root) == 0
    with oc.Agent(root, keep=oc.last(1), options=oc.Options(other_tree=True)) as agent:
        assert agent.restore(None, step=1) is not None  # back to where it was still good
        agent.save(2, {"w": jnp.ones(4)})
        agent.wait_until_finished()
        assert agent.all_steps() == [1, 2]
    assert sorted(path.name for path in root.iterdir() if path.name.isdecimal()) == ["1", "2", "3"]
    with compat.CheckpointManager(root) as manager:
        assert manager.latest_step() == 2


STRANGE: dict[str, Callable[[Path], object]] = {
    "a step that does not say what its tree is": lambda path: (
        (path / "default" / "w").mkdir(parents=True),
        (path / "default" / "checkpoint").write_bytes(b"\x80"),
    ),
    "half copied": lambda path: (path / "default" / "d").mkdir(parents=True),
    "empty": lambda path: path.mkdir(),
    "flax": lambda path: (path.mkdir(), (path / "checkpoint").write_bytes(b"\x80")),
    "a link to nowhere": lambda path: path.symlink_to("/nonexistent"),
    "of Pathways' or a store": lambda path: (path.mkdir(), (path / "commit_success.txt").touch()),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("beside", [(), (10,)], ids=["alone", "beside steps"])
def test_what_is_called_like_a_step_and_is_none_that_we_know_is_named(
    root: Path, beside: tuple[int, ...], make: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    root.mkdir()
    if beside:
        orbax(root, *beside)
    make(root / "30")
    rejected_unchanged(root, "holds 30, named like steps of Orbax's", "move them elsewhere")
    before = snapshot(root)
    assert run_adopt(root) == 2
    assert "30" in capsys.readouterr().err
    assert snapshot(root) == before


def test_what_is_not_called_like_a_step_does_not_matter(root: Path) -> None:
    for name in ("logs", "run_a", "20.orbax-checkpoint-tmp-17", "20.orbax-checkpoint-tmp", "events", "x10"):
        (root / name / "default").mkdir(parents=True)
    (root / "seed_3" / "journal").mkdir(parents=True)  # another run
    (root / "7").write_text("a file")
    assert rejection(root) is None
    with compat.CheckpointManager(root) as manager:
        manager.save(1, args=SAVE({"w": jnp.ones(4)}))
        manager.wait_until_finished()
        assert manager.latest_step() == 1
    for name in ("best_100", "ema_100"):  # exports of the user's
        ocp.PyTreeCheckpointer().save(root.absolute() / name, {"w": jnp.ones(2)})
    assert rejection(root) is None


def test_exports_beside_orbaxs_steps_are_none_of_them(root: Path) -> None:
    orbax(root, 7)
    for name in ("best_7", "ema_9"):
        ocp.PyTreeCheckpointer().save(root.absolute() / name, {"w": jnp.ones(2)})
    assert run_adopt(root) == 0 and rejection(root) is None
    assert oc.open_run(root).all_steps() == [7]


def test_steps_of_flax_that_orbax_wrote_are_adopted(root: Path) -> None:
    for step in (10, 20):
        ocp.PyTreeCheckpointer().save(root.absolute() / f"checkpoint_{step}", {"w": jnp.full(2, float(step))})
    rejected_unchanged(root, "holds 2 steps of Orbax's own (newest 20)")
    assert run_adopt(root) == 0 and rejection(root) is None
    assert float(oc.open_run(root).restore().state["w"][0]) == 20.0
    ocp.PyTreeCheckpointer().save(root.absolute() / "checkpoint_30", {"w": jnp.ones(2)})
    rejected_unchanged(root, "holds 1 steps of Orbax's own (newest 30)")


def test_two_directories_of_one_step_and_numbers_beyond_what_a_step_may_be(root: Path) -> None:
    orbax(root, 7)
    shutil.copytree(root / "7", root / "ckpt_7")
    rejected_said = ("7 and ckpt_7 are both step 7", "move one elsewhere")
    with pytest.raises(oc.UsageError) as caught:
        rejection(root)
    assert all(text in str(caught.value) for text in rejected_said)
    assert run_adopt(root) == 2
    shutil.move(root / "ckpt_7", root / "99999999999")
    with pytest.raises(oc.UsageError, match="steps are at most"):
        compat.CheckpointManager(root)
    assert not (root / "journal").exists()


def test_steps_in_an_object_store_are_not_taken_for_an_empty_run() -> None:
    storage = MemoryStorage()
    store = JournalStore(storage, writer="test")
    storage.create("00logs.txt", b"")
    assert unadopted(store, None) is None
    for key in ("events/0.jsonl", "journal/x", "seed_3/journal/x", "steps/00000001/x", "x_1/a"):
        storage.create(key, b"")
    assert unadopted(store, None) is None
    for key in ("10/default/_METADATA", "10/default/d/x", "9/commit_success.txt", "ckpt_8/_CHECKPOINT_METADATA"):
        storage.create(key, b"")
    assert "holds 10, 9, ckpt_8, named like steps of Orbax's" in (unadopted(store, None) or "")
    assert "holds 10, named like" in (unadopted(store, head(live(9))) or "")
    assert unadopted(store, head(live(10))) is None


# Malformed.

_METADATA = "default/_METADATA"
_KEYS = "default/array_metadatas/process_0"
_PRNG = '{"array_metadatas": [{"array_metadata": {"param_name": "w", "ext_metadata": {"random_key_impl": %s}}}]}'


def written(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


def leaf(**changes: Any) -> Callable[[Path], object]:
    """`_METADATA` with its first leaf changed."""

    def change(path: Path) -> None:
        described = json.loads(path.read_text())
        first = next(iter(described["tree_metadata"].values()))
        first |= changes
        path.write_text(json.dumps(described))

    return change


def key(name: Any) -> dict[str, Any]:
    return {"key_metadata": [{"key": name, "key_type": 2}]}


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


MALFORMED: list[tuple[str, Callable[[Path], object]]] = [
    *(
        (name, change)
        for name in ("_CHECKPOINT_METADATA", _METADATA, _KEYS, "default/_strings.json", "metrics/metrics")
        for change in (
            *(written(""), written("{"), written("[]"), written("3"), written("null"), written(DEEP)),
            written(b"\xff{}"),
            *(replaced(lambda path: path.mkdir()), replaced(os.mkfifo), written("9" * 5000)),
            replaced(lambda path: path.symlink_to("/etc/hostname")),
        )
    ),
    ("meta/metadata", written("{")),
    ("meta/metadata", written(DEEP)),
    ("meta/metadata", written("[" * 200 + "]" * 200)),
    ("_CHECKPOINT_METADATA", written('{"custom_metadata": [1]}')),
    ("_CHECKPOINT_METADATA", written('{"commit_timestamp_nsecs": 1e300}')),
    ("_CHECKPOINT_METADATA", written('{"commit_timestamp_nsecs": NaN}')),
    ("_CHECKPOINT_METADATA", written('{"commit_timestamp_nsecs": -5}')),
    (_METADATA, written("{}")),
    (_METADATA, written('{"tree_metadata": {"a": {}}}')),
    (_METADATA, written('{"tree_metadata": NaN}')),
    (_METADATA, leaf(key_metadata=None)),
    (_METADATA, leaf(key_metadata=[{"key": None, "key_type": 2}])),
    (_METADATA, leaf(key_metadata=[{"key": "w"}])),
    (_METADATA, leaf(value_metadata={})),
    (_METADATA, leaf(value_metadata={"value_type": "jax.Hologram"})),
    (_METADATA, leaf(**key(".."))),
    (_METADATA, leaf(**key("../../../other"))),
    (_METADATA, leaf(**key("/etc"))),
    (_METADATA, leaf(**key(""))),
    (_METADATA, leaf(**key("nowhere"))),
    (_METADATA, leaf(**key("\ud800"))),
    (_METADATA, leaf(**key("\ud800"), value_metadata={"value_type": "Dict"})),
    ("default/_strings.json", written('{"text": "\\ud800"}')),
    ("\udcff", lambda path: (path.mkdir(), (path / "metadata").write_text("{}"))),
    ("metrics/metrics", written('{"\\ud800": 1.0}')),
    ("meta/metadata", written('{"\\ud800": 1.0}')),
    (_METADATA, leaf(**key("w"), value_metadata={"value_type": "jax.Array", "skip_deserialize": True})),
    (_KEYS, written('{"array_metadatas": [{"array_metadata": {}}]}')),
    (_KEYS, written(_PRNG % "3")),
    (_KEYS, written(_PRNG % '"x"')),
    ("default/_strings.json", written("{}")),
    ("default/_strings.json", written('{"text": 3}')),
    ("default/manifest.ocdbt", written("x")),
    ("default/manifest.ocdbt", replaced(lambda path: path.symlink_to("/etc/hostname"))),
    ("default/d", lambda path: (shutil.move(path, f"{path}2"), path.symlink_to(f"{path}2"))),
    ("default", lambda path: (shutil.move(path, f"{path}2"), path.symlink_to(f"{path}2"))),
    ("default/d/link", lambda path: path.symlink_to("/etc/passwd")),
    ("default/d/pipe", os.mkfifo),
    ("default/a\\b", written("")),
    ("default/\udcff", written("")),
]  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return orbax(tmp_path_factory.mktemp("orbax") / "run", 5, metrics={"loss": 1.0})


@pytest.mark.parametrize(("name", "change"), MALFORMED)
def test_a_malformed_step_is_one_clear_line_and_nothing_is_written(
    root: Path, template: Path, name: str, change: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(template, root)
    change(root / "5" / name)
    before = list(root.rglob("*"))
    assert run_adopt(root) in (1, 2, 4)
    error = capsys.readouterr().err
    assert error.startswith("orchestrator adopt: ") and "Traceback" not in error and error.count("\n") == 1
    assert str(root / "5") in error and len(error) < 2000
    assert list(root.rglob("*")) == before


@pytest.mark.parametrize("name", ["../../../other/w", "../default/w", "/{outside}/w", "w/../w"])
def test_a_name_that_leads_out_of_its_step_is_rejected_though_an_array_is_there(
    name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    for where in (root, tmp_path / "other"):
        with ocp.CheckpointManager(where, item_handlers=handler) as manager:
            manager.save(5, args=ocp.args.PyTreeSave({"w": jnp.ones(4)}))
    shutil.move(tmp_path / "other" / "5" / "default" / "w", tmp_path / "other" / "w")
    leaf(**key(name.format(outside=tmp_path / "other")))(root / "5" / _METADATA)
    assert run_adopt(root) == 4
    assert "is not a plain relative path" in capsys.readouterr().err
    assert not (root / "journal").exists()


def test_a_linked_step_is_rejected_and_what_it_leads_to_is_left_alone(root: Path, tmp_path: Path) -> None:
    orbax(tmp_path / "disk", 5)
    root.mkdir()
    (root / "5").symlink_to(tmp_path / "disk" / "5")
    rejected_unchanged(root, "holds 1 steps of Orbax's own (newest 5)")
    before = snapshot(tmp_path)
    assert run_adopt(root) == 2
    assert snapshot(tmp_path) == before

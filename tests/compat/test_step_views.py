"""The directories of steps beside a run, for what looks into `ROOT/5/...`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint
import pytest
from msgspec import structs

import orchestrator as oc
from orchestrator import compat
from orchestrator.cli.main import main
from orchestrator.compat.managed_run import ManagedRun
from orchestrator.compat.store_directory import StoreDirectory
from orchestrator.rules import journal, keys, removal
from orchestrator.rules.records import Head
from orchestrator.run import orbax_views
from tests.support.runs import now, store_of

ARGS = orbax.checkpoint.args


def save(manager: Any, *steps: int) -> None:
    for step in steps:
        manager.save(step, args=ARGS.StandardSave({"w": jnp.full(4, float(step))}))
    manager.wait_until_finished()


def shown(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.isdecimal())


def test_a_step_directory_is_no_step_of_orbax_to_be_adopted(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2, 3)
    assert shown(root) == ["1", "2", "3"]
    # Retired by somebody who was killed before the directory was taken away: it is newer than the run's newest step.
    store_of(root).append(partial(removal.remove, step=3))
    assert shown(root) == ["1", "2", "3"]
    with oc.Agent(root, options=now()) as agent:  # which would be rejected beside Orbax's own steps
        assert agent.save(4, {"w": jnp.zeros(4)})
        assert agent.all_steps() == [1, 2, 4]
    assert main(["orchestrator", "verify", str(root)]) == 0


def test_steps_of_a_native_agent_are_shown_and_lost_directories_are_made_again(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(3, {"w": jnp.ones(2)})
    assert shown(root) == []
    compat.CheckpointManager(root)
    assert shown(root) == ["3"]
    with orbax.checkpoint.StandardCheckpointer() as reader:
        assert reader.restore(root.absolute() / "3" / "default")["w"].shape == (2,)
    for path in (root / "3").rglob("*"):
        assert not path.is_symlink()


def test_a_directory_goes_with_its_step_whoever_retires_it(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2, 3)
        manager.delete(3)
        assert shown(root) == ["1", "2"]
    assert main(["orchestrator", "gc", str(root), "--keep_last=1"]) == 0
    assert shown(root) == ["2"]


def test_a_quarantined_step_is_not_shown(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2)
        (manifest,) = root.glob("steps/00000002/*/manifest.json")
        manifest.write_bytes(b"{}")
        manager.restore()
    compat.CheckpointManager(root)
    assert shown(root) == ["1"]


def test_a_read_only_manager_makes_no_directory(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(3, {"w": jnp.ones(2)})
    options = orbax.checkpoint.CheckpointManagerOptions(read_only=True)
    assert compat.CheckpointManager(root, options=options).restore(3)["w"].shape == (2,)
    assert shown(root) == []


def test_a_directory_of_somebody_else_is_never_touched(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with compat.CheckpointManager(root) as manager:
        save(manager, 1)
        (root / "2").mkdir()
        (root / "2" / "mine").touch()
        (root / "trash").symlink_to(outside)
        save(manager, 2)
    assert (root / "2" / "mine").exists()
    orbax_views.prune(root, partial(unlisted, root))  # nothing is live: every view goes
    assert shown(root) == ["2"] and (root / "2" / "mine").exists()
    view = root / "7"
    orbax_views.build(root, "7", "step 7 e0001-a01", "trash", lambda directory: None)
    with pytest.raises(oc.UsageError, match="a symbolic link"):
        orbax_views.prune(root, partial(unlisted, root))
    assert view.is_dir() and os.listdir(outside) == []


def test_a_step_directory_in_a_store_raises_where_orbax_has_one() -> None:
    directory: Any = StoreDirectory("gs://bucket/run")
    for ask in (
        lambda: (directory / "5" / "iter").exists(),
        lambda: directory / "ckpt_5",
        lambda: directory.joinpath("5", "iter"),
        lambda: list(directory.iterdir()),
    ):
        with pytest.raises(oc.UsageError, match="has no director"):
            ask()
    assert os.fspath(directory / "notes.txt") == "gs://bucket/run/notes.txt"
    assert os.fspath(directory) == str(directory) == "gs://bucket/run"


def unlisted(root: Path) -> Head:
    """A journal of this run in which no step is live."""
    head = store_of(root).require_head()
    return structs.replace(head, live=())


def test_only_what_was_made_here_is_taken_away_and_no_copy_of_it(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2)
    shutil.copytree(root / "2", root / "best")
    (root / "1").rename(root / "kept")
    shutil.copytree(root / "2", root / "3")
    for name in (".view-settings", ".view-" + "0" * 32):  # the second: what a builder that was killed has left
        (root / name).mkdir()
        os.utime(root / name, (1, 1))
    orbax_views.prune(root, partial(unlisted, root))
    assert not (root / "2").exists() and not (root / (".view-" + "0" * 32)).exists()
    for name in ("best", "kept", "3"):
        assert (root / name / "default" / "_METADATA").exists()
    assert (root / ".view-settings").is_dir()


def test_a_directory_that_was_copied_to_another_place_is_a_step_of_orbax_there(root: Path, tmp_path: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 7)
    other = tmp_path / "other"
    shutil.copytree(root / "7", other / "7")
    with pytest.raises(oc.UsageError, match="adopt"):
        compat.CheckpointManager(other)
    assert main(["orchestrator", "adopt", str(other)]) == 0
    assert compat.CheckpointManager(other).restore(7)["w"][0] == 7.0


def test_where_the_journal_and_the_data_were_removed_the_directories_are_steps_to_adopt(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2)
    for name in ("journal", keys.JOURNAL_INDEX, "steps"):
        shutil.rmtree(root / name, ignore_errors=True)
    orbax_views.prune(root, lambda: None)
    for opened in (compat.CheckpointManager, oc.Agent):
        with pytest.raises(oc.UsageError, match="adopt"), opened(root) as agent:
            agent.save(3, {"w": jnp.zeros(4)})
    assert shown(root) == ["1", "2"]
    assert main(["orchestrator", "adopt", str(root)]) == 0
    assert compat.CheckpointManager(root).restore(2)["w"][0] == 2.0


def test_a_run_that_was_copied_whole_has_directories_of_its_own(root: Path, tmp_path: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2, 3)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=os.link)
    with compat.CheckpointManager(copy) as manager:
        manager.delete(3)
    assert shown(copy) == ["1", "2"] and shown(root) == ["1", "2", "3"]
    with compat.CheckpointManager(root) as manager:
        manager.delete(3)
    assert shown(root) == ["1", "2"]


def test_a_step_that_is_committed_while_others_are_taken_away_stays_shown(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1)

        def newer() -> Head | None:
            save(manager, 2)
            return store_of(root).head()

        orbax_views.prune(root, newer)
    assert shown(root) == ["1", "2"]


def test_who_makes_a_directory_first_keeps_it(root: Path) -> None:
    root.mkdir()

    def fill(directory: Path) -> None:
        (directory / "ours").touch()
        (root / "5").mkdir()
        (root / "5" / "theirs").touch()

    orbax_views.build(root, "5", "step 5 e0001-a01 00000000", "", fill)
    assert sorted(path.name for path in root.rglob("*")) == ["5", "theirs"]


class TwoFiles(orbax.checkpoint.CheckpointHandler):
    def save(self, directory: Any, args: Any) -> None:
        for name in args.names:
            (directory / name).write_text(name)

    def restore(self, directory: Any, args: Any = None) -> Any:
        return sorted(path.name for path in directory.iterdir())


@ARGS.register_with_handler(TwoFiles, for_save=True)
@dataclass
class TwoFilesSave(ARGS.CheckpointArgs):
    names: tuple[str, ...] = ("a", "b")


def test_a_directory_has_all_files_of_a_handler_of_the_users_own(root: Path) -> None:
    with compat.CheckpointManager(root, item_handlers={"two": TwoFiles()}) as manager:
        manager.save(1, args=ARGS.Composite(two=TwoFilesSave()))
        manager.wait_until_finished()
        assert sorted(path.name for path in (root / "1" / "two").iterdir()) == ["a", "b"]
        for name in ("a\nb", "a\\b"):  # which would never be read back
            with pytest.raises(oc.UsageError, match="its handler wrote a file"):
                manager.save(2, args=ARGS.Composite(two=TwoFilesSave((name,))))
        assert manager.all_steps() == [1]


@pytest.mark.parametrize("body", [b'{"batch": 7}', b'{"shard": "x", "files": {"a": "b"}}', b"[1]", b"\xff"])
def test_the_bytes_of_a_native_agents_process_are_nobodys_items(root: Path, body: bytes) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jnp.ones(2)}, process_state=body)
    manager = compat.CheckpointManager(root)
    assert sorted(path.name for path in (root / "1").iterdir() if not path.name.startswith((".", "_"))) == ["default"]
    assert list(manager.item_metadata(1)) == ["w"]
    assert oc.open_run(root).restore(like={"w": jnp.zeros(2)}).process_states == {0: body}


@pytest.mark.parametrize("name", ["../../evil", "../evil", "/tmp/orchestrator-evil", "a/b"])
def test_an_item_is_a_directory_of_its_step_or_none(root: Path, name: str) -> None:
    with compat.CheckpointManager(root) as manager:
        manager.save(1, args=ARGS.Composite(**{name: ARGS.JsonSave({"a": 1})}))
        manager.save(2, args=ARGS.Composite(good=ARGS.JsonSave({"a": 1})))
        manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
    assert shown(root) == ["2"]  # one that cannot be shown keeps none of the others
    there = {path.name for path in root.iterdir()} | {path.name for path in root.parent.iterdir()}
    assert "evil" not in there and not Path("/tmp/orchestrator-evil").exists()


class BehindProcess0:
    """A process that hears what process 0 has done."""

    process, count, hosts = 1, 2, {0: "a", 1: "b"}

    def __init__(self, missing: str, stays: str) -> None:
        self._said = [missing, stays]

    def broadcast(self, name: str, message: Any, timeout_s: float) -> Any:
        return {"value": self._said}


def test_a_process_that_is_behind_goes_by_what_process_0_has_removed(root: Path) -> None:
    with compat.CheckpointManager(root) as manager:
        save(manager, 1, 2)
        manager.delete(2)
        with pytest.raises(FileNotFoundError, match="no step 2"):
            manager.delete(2)
    run = ManagedRun(str(root), orbax.checkpoint.CheckpointManagerOptions())
    other: Any = run
    other.rendezvous = BehindProcess0("", "")
    run.delete(2)  # process 0 has; here it is gone already
    other.rendezvous = BehindProcess0("no step 9", "")
    with pytest.raises(FileNotFoundError, match="no step 9"):
        run.delete(9)
    other.rendezvous = BehindProcess0("", "the only one")
    with pytest.raises(oc.UsageError, match="the only one"):
        run.delete(1)


def test_a_manager_that_was_replaced_deletes_nothing_of_its_successors(root: Path) -> None:
    manager = compat.CheckpointManager(root)
    save(manager, 1, 2)
    store_of(root).append(journal.open_epoch)
    with pytest.raises(oc.Fenced):
        manager.delete(2)
    assert compat.CheckpointManager(root).all_steps() == [1, 2]
    manager.close()

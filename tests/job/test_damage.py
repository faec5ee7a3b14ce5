"""What is stored is not what was saved: never loaded silently, stepped over where that was not forbidden."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import orchestrator as oc
from orchestrator import compat, errors
from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.cli.main import main
from orchestrator.reader import Run
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.tools.verify import read_back
from tests.support.fakes import HookedStorage
from tests.support.runs import LIKE, fill, journal_of, now, state
from tests.support.snapshots import snapshot


def edit(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(attempt: Path) -> None:
        found = sorted(file for file in attempt.glob(pattern) if file.is_file())
        assert found, pattern
        for file in found:
            file.write_bytes(change(file.read_bytes()))

    return damage


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(attempt: Path) -> None:
        for file in sorted(file for file in attempt.glob(pattern) if file.is_file()):
            file.unlink()

    return damage


def of_the_other_step(name: str) -> Callable[[Path], None]:
    """A whole, valid record in the wrong place: what a careless copy does."""

    def damage(attempt: Path) -> None:
        (other,) = attempt.parent.parent.glob(f"00000001/*/{name}")
        (attempt / name).write_bytes(other.read_bytes())

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "manifest edited": (edit("manifest.json", lambda body: body + b" "), "manifest.json"),
    "manifest gone": (remove("manifest.json"), "manifest.json: is missing"),
    "manifest of another step": (of_the_other_step("manifest.json"), "manifest.json: crc32c is"),
    "extra of another step": (of_the_other_step("extra.json"), "extra.json: "),
    "extra edited": (edit("extra.json", lambda body: body.replace(b'"at":2', b'"at":3')), "extra.json"),
    "intent edited": (edit("intent.json", lambda body: body.replace(b'"count"', b'"coUnt"')), "intent.json"),
    "intent of a newer format by a flipped bit": (
        edit("intent.json", lambda body: body.replace(b'"format":1', b'"format":5')),
        "intent.json",
    ),
    "process state edited": (edit("process/*", lambda body: body[::-1]), "process/00000.bin"),
    "process state gone": (remove("process/*"), "process/00000.bin: is missing"),
    "data file gone": (remove("state/ocdbt.process_0/d/*"), "is missing, the manifest says"),
    "data file cut": (edit("state/ocdbt.process_0/d/*", lambda body: body[:-1]), "the manifest says"),
    "data files zeroed": (edit("state/**/d/*", lambda body: bytes(len(body))), "not a part of an OCDBT store"),
}


def damaged_run(root: Path, how: str) -> str:
    """A run whose newest step, 2, is damaged. What the error must say."""
    fill(root, 1, 2)
    damage, said = DAMAGE[how]
    (attempt,) = root.glob("steps/00000002/*")
    damage(attempt)
    return said


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_step_is_quarantined_and_the_one_before_is_restored(root: Path, how: str) -> None:
    said = damaged_run(root, how)
    with oc.Agent(root, options=now()) as agent:
        restored = agent.restore(LIKE)
        assert restored is not None
        assert (restored.step, restored.state["count"], restored.process_states) == (1, 1, {0: b"reader at 1"})
        assert (agent.latest_step(), agent.all_steps()) == (1, [1])
        events = [head.event for head in journal_of(root)]
        (event,) = [event for event in events if event.kind == "quarantined"]
        assert (events[-1].kind, events[-1].step) == ("restored", 1)
        assert (event.kind, event.step, event.attempt) == ("quarantined", 2, "e0001-a01")
        assert said in event.reason
        with pytest.raises(
            oc.StepNotFound,
            match=r"step 2 is quarantined \(.*`orchestrator release .* --step=2` .*; restorable steps: 1",
        ):
            agent.restore(LIKE, step=2)
        assert agent.save(2, state(2))  # training comes to that step again
        assert agent.all_steps() == [1, 2]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("arguments", [{"step": 2}, {"strict": True}], ids=["step given", "strict"])
def test_a_step_that_was_asked_for_and_strict_never_step_down(root: Path, how: str, arguments: Any) -> None:
    said = damaged_run(root, how)
    with oc.Agent(root, options=now()) as agent:
        with pytest.raises(oc.Damaged) as caught:
            agent.restore(LIKE, **arguments)
        assert said in str(caught.value) and "step 2" in str(caught.value)
    assert journal_of(root)[-1].live == journal_of(root)[2].live  # at most an epoch was opened


@pytest.mark.parametrize("how", DAMAGE)
def test_a_reader_steps_down_too_and_writes_nothing(root: Path, how: str) -> None:
    damaged_run(root, how)
    before = snapshot(root)
    reader = oc.open_run(root)
    assert reader.restore(LIKE).step == 1
    with pytest.raises(oc.Damaged):
        reader.restore(LIKE, step=2)
    assert snapshot(root) == before


def test_an_intent_of_another_step_is_damage_though_it_is_a_valid_record(root: Path) -> None:
    fill(root, 1, 2)
    (attempt,) = root.glob("steps/00000002/*")
    of_the_other_step("intent.json")(attempt)
    with pytest.raises(oc.Damaged, match=r"intent\.json"):
        oc.open_run(root).restore(LIKE, step=2)


def test_when_every_step_is_damaged_there_is_nothing_to_restore(root: Path) -> None:
    fill(root, 1, 2)
    for attempt in root.glob("steps/*/*"):
        DAMAGE["manifest gone"][0](attempt)
    with pytest.raises(oc.NothingToRestore, match=r"step 2: .*\n.*step 1: "):
        oc.open_run(root).restore(LIKE)
    agent, before = oc.Agent(root), snapshot(root / "steps")
    with pytest.raises(oc.NothingToRestore, match=r"nothing was changed\n  step 2: .*\n  step 1: "):
        agent.restore(LIKE)
    assert (agent.all_steps(), snapshot(root / "steps")) == ([1, 2], before), "nothing fits, so nothing is journalled"
    assert errors.NothingToRestore.exit_code == 6


def test_a_run_whose_steps_were_all_quarantined_before_is_no_new_run(root: Path) -> None:
    fill(root, 1, 2)
    for step in (1, 2):
        assert main(["orchestrator", "quarantine", str(root), f"--step={step}", "--reason=loss spike", "--force"]) == 0
    before = snapshot(root)
    reader = oc.open_run(root)
    manager = compat.CheckpointManager(root)
    for ask in (reader.restore, reader.latest_step, manager.restore, manager.latest_step):
        with pytest.raises(oc.NothingToRestore, match=NONE_LEFT) as caught:
            ask()
        assert not isinstance(caught.value, FileNotFoundError)  # what an Orbax loop takes for a new run
    assert (reader.all_steps(), manager.all_steps(), snapshot(root)) == ([], [], before)
    with oc.Agent(root, options=now()) as agent:
        for ask in (lambda: agent.restore(LIKE), agent.latest_step):
            with pytest.raises(oc.NothingToRestore, match=NONE_LEFT):
                ask()
        assert agent.save(3, state(3))  # who goes on all the same can save, and come back
        restored = agent.restore(LIKE)
        assert restored is not None and restored.step == 3


NONE_LEFT = r"all 2 steps are quarantined \(newest: step 2\); `orchestrator log file://\S+` says why, .* another root"


class Unreadable:
    """A hook: the store cannot read `names`, as a disk with bad sectors or an outage would have it."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, operation: str, key: str) -> None:
        if operation == "get" and key.startswith(self.names) and key.endswith("extra.json"):
            raise errors.StorageError(f"{operation} {key}: EIO (Input/output error)")


def test_a_store_that_fails_is_no_reason_to_begin_at_an_older_step(root: Path) -> None:
    fill(root, 1, 2)
    store = HookedStorage(PosixStorage(str(root)), before=Unreadable("steps/00000002/"))
    said = r"step 2 e0001-a01 cannot be read now, and nothing was changed for it: process 0 \(.*EIO"
    with oc.Agent(root, options=now(), storage=store) as agent:
        for arguments in ({}, {"strict": True}, {"step": 2}):
            with pytest.raises(oc.Unavailable, match=said):
                agent.restore(LIKE, **arguments)
        assert agent.all_steps() == [1, 2]
    reader = Run(JournalStore(store, "reader"))
    with pytest.raises(oc.StorageError, match="EIO"):
        reader.restore(LIKE)
    with oc.Agent(root, options=now()) as agent:
        restored = agent.restore(LIKE)
        assert restored is not None and restored.step == 2, "once it answers, all is as it was"


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "d/../../secret"])
def test_a_store_whose_tree_points_out_of_its_directory_is_not_followed(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"not yours")
    state = tmp_path / "state"
    state.mkdir()
    nodes, manifest = ocdbt.encode([b"w/c/0"], [(path, 0, 9)], "nodes", 0, bytes(16), 1)
    (state / "nodes").write_bytes(nodes)
    (state / ocdbt.MANIFEST).write_bytes(manifest)
    store = LocalStore(str(state))
    places = store.index()
    assert places is not None and places["w/c/0"] == (path, 0, 9)
    with pytest.raises(oc.UnsafeKey, match="not a plain relative path"):
        store.read_into(memoryview(bytearray(5)), (path, 0, 9), "w")
    store.close()


def test_running_out_of_descriptors_is_no_damage(root: Path) -> None:
    fill(root, 1)
    (attempt,) = root.glob("steps/00000001/*")
    store = LocalStore(str(attempt / "state"))
    assert store.index()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(oc.StorageError, match="Too many open files"):
            LocalStore(str(attempt / "state")).index()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        store.close()


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_a_flipped_bit_anywhere_in_the_data_is_never_loaded_silently(root: Path, fraction: float) -> None:
    wanted = {"w": jnp.asarray(np.random.default_rng(0).random((256, 256), np.float32))}
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, wanted)
    file = max(root.glob("steps/*/*/state/**/d/*"), key=lambda path: path.stat().st_size)
    body = bytearray(file.read_bytes())
    body[int(len(body) * fraction)] ^= 16
    file.write_bytes(body)
    with pytest.raises(oc.Damaged, match="w: "):
        oc.open_run(root).restore(wanted, step=1)


def test_verify_reads_the_chunks_too(root: Path) -> None:
    fill(root, 1)
    journal_store = JournalStore(PosixStorage(str(root)), "test")
    step = journal_store.find(1)
    assert step is not None
    verdict = read_back(journal_store, step)
    assert verdict.good and (verdict.files, verdict.chunks) == (len(journal_store.step(step).manifest.files), 2)
    assert journal_store.step(step).manifest.chunks.keys() == {"w/c/0", "count/c"}

"""A real run is cut off after each of its effects on the disk, by a crash or a power cut; the real code recovers."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import orchestrator as oc
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import name_of
from orchestrator.rules.journal import StoredAttempt
from orchestrator.rules.records import Head, LiveStep
from orchestrator.run import checked_reads, survey
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.tools.recover import plan, write
from orchestrator.tools.verify import read_back
from tests.proof.crash import Disk, Effect, lay_out, record
from tests.proof.model import invariants

JOB = Path(__file__).parents[1] / "support" / "jobs" / "crash_job.py"
LIKE = {"w": jnp.zeros(512), "count": 0}
Image = dict[str, bytes | None]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Effect]]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    base = tmp_path_factory.mktemp("crash")
    root = base / "run"
    root.mkdir()
    return str(root), record(JOB, root, base / "strace", deadline_s=120)


def points(
    trace: tuple[str, list[Effect]], *, power_cut: bool
) -> Iterator[tuple[str, Image, frozenset[tuple[int, str]]]]:
    """(where, what is left, saves that had been reported) after each effect, and with the last write torn; each
    different combination once."""
    root, effects = trace
    disk, saved, seen = Disk(root), set[tuple[int, str]](), set[object]()
    for number, effect in enumerate(effects):
        torn = effect.call == "write" and not power_cut and len(effect.data) > 1
        for part in (
            (effect.data[: len(effect.data) // 2], effect.data[len(effect.data) // 2 :]) if torn else (effect.data,)
        ):
            disk.apply(replace(effect, data=part))
            if effect.call == "said":
                for line in effect.data.decode().splitlines():
                    if line.startswith("saved "):
                        step, epoch = line.split()[1:]
                        saved.add((int(step), name_of(int(epoch), 1)))
            image = disk.image(power_cut=power_cut)
            key = (
                frozenset((name, data and hashlib.sha256(data).digest()) for name, data in image.items()),
                len(saved),
            )
            if key not in seen:
                seen.add(key)
                yield f"after {number} effects, {effect.call} {effect.path.removeprefix(root)}", image, frozenset(saved)


def broken(image: Image, saved: frozenset[tuple[int, str]], root: Path) -> list[str]:
    """What is not as promised when the run is taken up from `image`."""
    lay_out(image, root)
    store = JournalStore(PosixStorage(str(root)), "explorer")
    heads = list(store.entries())
    left = heads[-1] if heads else None
    problems = invariants.linear(heads) + invariants.journalled(heads, saved)
    problems += invariants.whole(left, partial(damage, store))
    problems += invariants.promises(heads, receipts(store))
    newest = invariants.restorable(left)[-1].step if invariants.restorable(left) else None
    problems += untouched(root, store, left)
    with oc.Agent(root, keep=oc.last(2), options=oc.Options(async_save=False, on_save_failure="raise")) as agent:
        problems += invariants.listing(left, agent.all_steps(), agent.latest_step())
        restored = agent.restore(LIKE)
        if (restored and restored.step) != newest:
            problems.append(f"restored {restored and restored.step}, the newest is {newest}")
        if restored and not np.array_equal(restored.state["w"], np.full(512, float(restored.step))):
            problems.append(f"wrong values at step {restored.step}")
        if restored and restored.process_states != {0: b"at %d" % restored.step}:
            problems.append(f"wrong process state at step {restored.step}")
        problems += collected(store)
        agent.save(9, {"w": jnp.full(512, 9.0), "count": 9}, process_state=b"at 9")
        if agent.latest_step() != 9:
            problems.append("the next save was not committed")
    return problems + invariants.linear(list(store.entries())) + invariants.whole(store.head(), partial(damage, store))


def untouched(root: Path, store: JournalStore, left: Head | None) -> list[str]:
    """9 and 13: an agent that is made, and one of another job, open no epoch and write nothing."""
    before = {entry.key for entry in store.storage.list("")}
    problems = []
    with oc.Agent(root, options=oc.Options(async_save=False, on_save_failure="raise")) as agent:
        asked = agent.all_steps(), agent.epoch
        if asked[1] is not None:
            problems.append(f"13: epoch {asked[1]} was opened by asking")
        if invariants.restorable(left):
            with pytest.raises(oc.OtherJob):
                agent.save(9, {"other": jnp.zeros(3)})
    if more := {entry.key for entry in store.storage.list("")} - before:
        problems.append(f"9: {sorted(more)} was left by a job that was rejected")
    return problems


def collected(store: JournalStore) -> list[str]:
    """5 and 8: what a collector deletes once a new incarnation is open, and before it has saved anything."""
    heads, before = list(store.entries()), survey.attempts(store.storage)
    collect(JournalStore(store.storage, "gc"))
    after = survey.attempts(store.storage)
    stored = {key: (one.whole, -1) for key, one in before.items()}
    gone = [key for key, one in before.items() if after.get(key, StoredAttempt()).bytes < one.bytes]
    return [line for key in gone for line in invariants.deleted(heads, *key, stored)]


_damage: dict[
    tuple[Any, ...], str
] = {}  # the images have few attempts that differ, and each is looked at in hundreds of them


def damage(store: JournalStore, live: LiveStep) -> str:
    names = sorted(entry.key for entry in store.storage.list(live.id.prefix))
    key = repr(live), tuple((name, hashlib.sha256(store.storage.get(name) or b"").digest()) for name in names)
    if key not in _damage:
        _damage[key] = "; ".join(read_back(store, live).damaged)
    return _damage[key]


def receipts(store: JournalStore) -> Iterator[tuple[int, str, int, str]]:
    for attempt in survey.attempts(store.storage):
        try:
            found = checked_reads.receipts(store.storage, attempt, keys.receipt_name(0))
        except oc.Damaged as error:
            yield *attempt, 0, str(error)
            continue
        receipt = found[0][0] if found else None
        if receipt and receipt.failure is None:
            there = {entry.key: entry.bytes for entry in store.storage.list(attempt.prefix)}
            gone = [entry.path for entry in receipt.files if there.get(attempt.prefix + entry.path) != entry.bytes]
            yield *attempt, 0, f"{gone} is not there" if gone else ""


@pytest.mark.parametrize("power_cut", [False, True], ids=["crash", "power cut"])
@pytest.mark.timeout(300)
def test_whatever_is_left_after_any_effect_the_run_goes_on(
    trace: tuple[str, list[Effect]], tmp_path: Path, power_cut: bool
) -> None:
    count = 0
    # What had become durable is known from the trace; in memory the recoveries are spared a real disk's fsyncs.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    for where, image, saved in points(trace, power_cut=power_cut):
        with tempfile.TemporaryDirectory(prefix="recovered-", dir=memory) as directory:
            problems = broken(image, saved, Path(directory) / "run")
        assert problems == [], where
        count += 1
    print(f"{len(trace[1])} effects, {count} different images recovered")
    assert count > (40 if power_cut else 150)


@pytest.mark.timeout(300)
def test_a_copy_that_lacks_the_journals_newest_entries_loses_no_step(
    trace: tuple[str, list[Effect]], tmp_path: Path
) -> None:
    """12: whatever number of entries is missing. The job is told so, or nothing that is whole is deleted before it has
    saved a newer step; and a recovery brings all of them back."""
    root, effects = trace
    disk = Disk(root)
    for effect in effects:
        disk.apply(effect)
    image = disk.image(power_cut=False)
    versions = sorted(name for name in image if keys.journal_version(name) is not None)
    told = 0
    for kept in range(len(versions)):
        here = tmp_path / f"copy-{kept}"
        lay_out({name: body for name, body in image.items() if name not in versions[kept:]}, here)
        store = JournalStore(PosixStorage(str(here)), "explorer")
        before = {key for key, one in survey.attempts(store.storage).items() if one.whole}
        try:
            with oc.Agent(here, options=oc.Options(async_save=False, on_save_failure="raise")) as agent:
                agent.restore(LIKE)
                assert collected(store) == []
        except oc.JournalLost:
            told += 1
            assert {key for key, one in survey.attempts(store.storage).items() if one.whole} == before
        found = plan(store)
        if found.required or found.choice.added:
            write(store, found)
        known = {live.id for live in store.require_head().live}
        assert {(5, "e0002-a01"), (4, "e0002-a01"), (2, "e0001-a01")} <= known, kept
        reader = oc.open_run(here).restore(LIKE)
        assert reader.step == 5 and float(reader.state["w"][0]) == 5.0, kept
    assert told >= len(versions) - 5, "the loss of the last commit's few entries proves nothing, of more it does"

"""Whole runs in a bucket: saving under faults, an outage, reading with few rights, deleting, verifying, copying.

One process with its CPU devices; the multi-process story is `make demo STORAGE=gcs` (test_demo.py).
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import crc32c
import jax.numpy as jnp
import numpy as np
import pytest
from gcsfs.core import GCSFileSystem

import orchestrator as oc
from launch.gcs_emulator.process import EmulatorProcess
from orchestrator import arrays
from orchestrator.cli.main import main as cli
from orchestrator.errors import Suspect
from orchestrator.observe.events import Event, Retried, subscribe
from orchestrator.rules import chunk_index, journal, keys
from orchestrator.rules.codec import encode
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import MemoryStorage, PosixStorage, open_storage
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_http import Client
from tests.support.builders import head
from tests.support.gcs import ALL_FAULTS, BUCKET, faults, new_root
from tests.support.runs import now
from tests.support.snapshots import snapshot


def state(step: int) -> dict[str, Any]:
    return {"w": jnp.arange(4096.0).reshape(64, 64) + step, "b": {"c": jnp.full(7, step, jnp.bfloat16)}, "count": step}


def is_state(restored: oc.Restored, step: int) -> bool:
    found, expected = restored.state, state(step)
    arrays = [(found["w"], expected["w"]), (found["b"]["c"], expected["b"]["c"])]
    return found["count"] == step and all(np.array_equal(a, b) for a, b in arrays)


def fill(root: str, *steps: int, **arguments: Any) -> None:
    with oc.Agent(root, options=now(), **arguments) as agent:
        for step in steps:
            assert agent.save(step, state(step), extra={"at": step}, process_state=f"reader at {step}".encode())


@pytest.mark.slow
def test_50_saves_with_restarts_and_five_percent_of_each_fault_lose_nothing(
    gcs: EmulatorProcess,
) -> None:
    root, told = new_root(), []
    storage = GcsStorage(root, Client(first_wait_s=0.02))  # a test has no time for waits meant for a real bucket
    events: list[Event] = []
    unsubscribe = subscribe(events.append)
    gcs.counts(reset=True)
    try:
        with faults(gcs, **ALL_FAULTS, slow_s=0.05, seed=2026):
            for incarnation in range(5):
                options = oc.Options(async_save=False)
                with oc.Agent(root, save=oc.every(1), keep=oc.last(100), options=options, storage=storage) as agent:
                    restored = agent.restore(state(0))
                    start = restored.step + 1 if restored else 0
                    assert start == len(told) and (restored is None or is_state(restored, start - 1))
                    for step in range(start, 10 * (incarnation + 1)):
                        assert agent.save(step, state(step))
                        assert agent.failures == 0
                        told.append(step)
    finally:
        unsubscribe()
    met = gcs.counts()["faults"]
    assert set(met) == set(ALL_FAULTS) and sum(met.values()) > 200
    retried = [event for event in events if isinstance(event, Retried) and event.what == "store"]
    # Every fault but "slow" makes somebody try again. All is counted but what curl, inside TensorStore, repeats by
    # itself when a connection that it used before is gone.
    counted = sum(event.tries if event.operation == "arrays" else 1 for event in retried)
    failed = sum(count for kind, count in met.items() if kind != "slow")
    assert 0.7 * failed < counted <= failed
    run = oc.open_run(root)
    assert run.all_steps() == told == list(range(50))
    for step in told:
        assert is_state(run.restore(step=step), step)
    assert cli(["orchestrator", "verify", root, "--all", "--repair_journal=never"]) == 0


def test_while_the_store_is_down_saves_fail_training_goes_on_and_the_next_save_works(
    gcs: EmulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The issue's 60 s outage with the store's patience scaled down alike."""
    monkeypatch.setenv("ORCHESTRATOR_STORE_DEADLINE_S", "0.5")
    root = new_root()
    with oc.Agent(root, options=oc.Options(save_timeout_s=3)) as agent:
        assert agent.save(0, state(0))
        agent.wait_until_finished()
        gcs.set_faults(down=True)
        started = time.monotonic()
        assert agent.save(1, state(1))  # the loop is not stopped
        assert time.monotonic() - started < 2
        agent.wait_until_finished()
        assert agent.failures == 1
        assert time.monotonic() - started < 30
        gcs.set_faults()
        assert agent.save(2, state(2))
        agent.wait_until_finished()
        assert agent.failures == 1
    run = oc.open_run(root)
    assert run.all_steps() == [0, 2]
    assert is_state(run.restore(), 2)


def test_a_store_that_is_down_while_restoring_is_no_damage(
    gcs: EmulatorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STORE_DEADLINE_S", "0.5")
    root = new_root()
    fill(root, 1, 2)
    run = oc.open_run(root)
    with oc.Agent(root) as agent:
        with faults(gcs, unavailable=1), pytest.raises(oc.Unavailable):
            agent.restore(state(0))
        with faults(gcs, down=True), pytest.raises(oc.Unavailable):
            run.restore()
        restored = agent.restore(state(0))
        assert restored and is_state(restored, 2)
    assert all(live.restorable for live in JournalStore(open_storage(root), "test").require_head().live)


def test_a_credential_that_may_only_read_is_enough_for_readers(
    gcs: EmulatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    root = new_root()
    fill(root, 1, 2)
    gcs.counts(reset=True)
    with faults(gcs, read_only=True):
        for command in (
            ["ls"],
            ["inspect"],
            ["log"],
            ["verify", "--repair_journal=never"],
            ["verify", "--by_store", "--all"],
        ):
            assert cli(["orchestrator", command[0], root, *command[1:]]) == 0
        assert is_state(oc.open_run(root).restore(), 2)
        told = gcs.counts()["operations"]
        assert set(told) == {"list", "get", "media"}  # nothing else was even tried
        assert cli(["orchestrator", "pin", root, "--step=1"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "HTTP 403" in error and "docs/gcs.md" in error


def test_opening_a_run_takes_a_few_requests_whatever_its_age(gcs: EmulatorProcess) -> None:
    root = new_root()
    storage = open_storage(root)
    store = JournalStore(storage, "test")

    def grow(first: int, last: int) -> None:
        """Entries as years of saving would leave them; the last one is appended as an agent would."""
        with ThreadPoolExecutor(16) as pool:
            entries = ((keys.journal_key(version), encode(head(version=version))) for version in range(first, last))
            list(pool.map(lambda entry: storage.create(*entry), entries))
        assert (appended := store.append(journal.open_epoch)) and appended.version == last

    told = []
    for first, last in ((0, 499), (500, 500), (501, 1000), (1001, 1400)):
        grow(first, last)
        gcs.counts(reset=True)
        assert JournalStore(open_storage(root), "reader").require_head().version == last
        told.append(gcs.counts()["operations"])
    assert told == [{"list": 2, "media": 1}] * 4
    markers = list(storage.list(keys.JOURNAL_INDEX))
    assert [keys.indexed_version(entry.key) for entry in markers] == [1000, 500]
    for entry in markers:  # hints, and no more
        storage.delete(entry.key)
    assert JournalStore(open_storage(root), "reader").require_head().version == 1400


@pytest.mark.parametrize("make", [MemoryStorage, lambda: open_storage(new_root())])
def test_markers_never_hide_an_entry(make: Any) -> None:
    storage = make()
    store = JournalStore(storage, "test")
    for _ in range(4):
        store.append(journal.open_epoch)
    storage.create(keys.index_key(2), b"")
    assert JournalStore(storage, "test").require_head().version == 3
    storage.create(keys.index_key(77), b"")  # it says more than there is
    storage.create(keys.JOURNAL_INDEX + "0stray", b"")
    assert JournalStore(storage, "test").require_head().version == 3
    assert [head.version for head in JournalStore(storage, "test").entries()] == [0, 1, 2, 3]


def test_a_retired_attempt_is_deleted_in_batches_and_finished_after_an_interruption(
    gcs: EmulatorProcess,
) -> None:
    root = new_root()
    fill(root, 1, 2)
    storage = open_storage(root)
    for index in range(230):
        storage.create(f"steps/00000001/e0001-a01/state/d/{index:03}", b"x")
    store = JournalStore(storage, "test")
    store.append(partial(journal.retire, keep=oc.last(1)))
    listed = iter(storage.delete_many([entry.key for entry in storage.list("steps/00000001/")]))  # type: ignore[attr-defined]
    next(listed)  # a collector that dies after its first request
    gcs.counts(reset=True)
    seen: list[str] = []
    result = collect(store, on_file=seen.append)
    assert result.failed == [] and len(seen) == result.files > 130
    assert gcs.counts()["operations"]["batch"] <= 3
    assert list(storage.list("steps/00000001/")) == []
    assert store.require_head().retired == ()
    assert is_state(oc.open_run(root).restore(), 2)


def test_a_tree_in_a_bucket_that_would_have_to_be_decompressed_is_decoded_by_nobody(gcs: EmulatorProcess) -> None:
    root = new_root()
    fill(root, 1)
    store = JournalStore(open_storage(root), "test")
    live = store.find(1)
    assert live is not None
    manifest = store.step(live).manifest
    state = f"steps/00000001/{live.attempt}/state/"
    stored = chunk_index.stored(manifest)
    node = next(path for path in stored.files if path.startswith("d/"))
    body = bytearray(store.storage.get(state + node) or b"")
    body[13] = 1  # says that it is compressed
    body[-4:] = crc32c.crc32c(bytes(body[:-4])).to_bytes(4, "little")
    store.storage.delete(state + node)
    store.storage.create(state + node, bytes(body))
    loads = [arrays.ReadRequest(leaf) for leaf in store.step(live).intent.tree.leaves]
    with pytest.raises(Suspect, match="tree is compressed or in parts; none of ours is"):
        arrays.load(f"{root}/{state}", loads, None, stored)
    with pytest.raises(oc.NothingToRestore, match=f"{node}: .*the manifest says"):
        oc.open_run(root).restore()


def test_verify_by_store_downloads_no_array_and_finds_what_was_changed(
    gcs: EmulatorProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    root = new_root()
    fill(root, 1)
    storage = open_storage(root)
    before = list(storage.list(""))
    gcs.counts(reset=True)
    assert cli(["orchestrator", "verify", root, "--by_store", "--json"]) == 0
    told = gcs.counts()["operations"]
    assert told["media"] <= 3 and told["get"] > 5  # the journal entry and the manifest
    assert list(storage.list("")) == before  # other tests' abandoned saves may still be writing, elsewhere
    data = max(storage.list("steps/00000001/"), key=lambda entry: entry.bytes)
    body = bytearray(storage.get(data.key) or b"")
    body[len(body) // 2] ^= 1
    storage.delete(data.key)
    storage.create(data.key, bytes(body))
    capsys.readouterr()
    assert cli(["orchestrator", "verify", root, "--by_store", "--repair_journal=never", "--json"]) == 4
    (found,) = json.loads(capsys.readouterr().out)
    assert len(found["problems"]) == 1 and f"{data.key}: has {data.bytes} bytes" in found["problems"][0]
    storage.delete("steps/00000001/e0001-a01/extra.json")
    assert cli(["orchestrator", "verify", root, "--by_store"]) == 4
    assert "extra.json: is missing" in capsys.readouterr().out
    assert cli(["orchestrator", "verify", root, "--by_store", "--sample=10%"]) == 2


def test_a_run_copied_between_a_bucket_and_a_disk_with_ordinary_tools_is_the_same_run(
    gcs: EmulatorProcess, tmp_path: Path
) -> None:
    root, local = new_root(), tmp_path / "copied"
    fill(root, 1, 2)
    bucket = GCSFileSystem(token="anon", project="p", use_listings_cache=False, skip_instance_cache=True)
    bucket.get(root, str(local), recursive=True)
    assert len(snapshot(local)) > 20
    assert oc.open_run(local).all_steps() == [1, 2]
    assert is_state(oc.open_run(local).restore(), 2)
    with oc.Agent(local, options=now()) as agent:  # and it goes on there
        restored = agent.restore(state(0))
        assert restored and restored.step == 2 and restored.process_states == {0: b"reader at 2"}
        assert agent.save(3, state(3))
    back = new_root()
    bucket.put(str(local), back, recursive=True)
    there = {entry.key: entry.bytes for entry in open_storage(back).list("")}
    assert there == {entry.key: entry.bytes for entry in PosixStorage(str(local)).list("")}
    assert is_state(oc.open_run(back).restore(), 3)
    assert cli(["orchestrator", "verify", back, "--all"]) == 0


def test_nothing_is_written_twice_a_second_and_nothing_outside_the_prefix(gcs: EmulatorProcess) -> None:
    root = new_root()
    gcs.counts(reset=True)
    fill(root, 1, 2, 3, keep=oc.last(1))
    assert gcs.counts()["rewritten_too_soon"] == 0
    above = root.removeprefix(f"gs://{BUCKET}/").partition("/")[0]
    listed = json.loads(gcs.ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={above}")[2])["items"]
    assert all(item["name"].startswith(f"{above}/run/") for item in listed)

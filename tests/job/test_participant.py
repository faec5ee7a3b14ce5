"""A save as the other processes decide it; and nothing reported or deleted because of an entry that could vanish."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import flatten
from orchestrator.job.coordinator import UserData, signal_prefix
from orchestrator.job.participant import Saver
from orchestrator.job.rendezvous import _Alone, connect
from orchestrator.observe import events
from orchestrator.observe.events import SavePhase
from orchestrator.options import Options
from orchestrator.policy import last
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt import Phase
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode
from orchestrator.rules.records import Receipt
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import PosixStorage
from tests.support.builders import FIRST, live
from tests.support.fakes import HookedStorage
from tests.support.runs import now


def a_run(root: Path) -> Catalog:
    """Step 1 committed and retired, step 2 committed; step 1's data is there."""
    catalog = Catalog(PosixStorage(str(root)), "test")
    catalog.append(journal.open_epoch)
    for step in (1, 2):
        catalog.storage.create(AttemptId(step, FIRST).prefix + keys.MANIFEST, b"{}")
        entry = live(step)
        catalog.append(partial(journal.commit, epoch=1, entry=entry, keep=last(1)))
    return catalog


def test_a_collector_makes_the_entry_that_retires_durable_before_it_deletes(tmp_path: Path) -> None:
    storage = HookedStorage(a_run(tmp_path).storage)
    assert collect(Catalog(storage, "gc")).files == 1
    operations = [call for call in storage.calls if call[0] in ("make_durable", "delete")]
    assert operations[0] == ("make_durable", keys.journal_key(2))
    assert [operation for operation, _ in operations[1:]] == ["delete"]


def test_a_dry_run_of_a_collector_needs_no_right_to_write(tmp_path: Path) -> None:
    storage = HookedStorage(a_run(tmp_path).storage)
    assert collect(Catalog(storage, "gc"), dry_run=True).files == 1
    assert {operation for operation, _ in storage.calls} <= {"get", "list"}


def test_a_worker_believes_a_commit_that_it_finds_in_the_journal_only_once_it_is_durable(tmp_path: Path) -> None:
    storage = HookedStorage(a_run(tmp_path).storage)
    unused = cast(Any, None)
    worker = Saver(
        Catalog(storage, "w"),
        unused,
        connect(1.0),
        None,
        Options(),
        epoch=1,
        run="",
        attest=False,
        committed=lambda: None,
    )
    save = worker.begin(2, UserData({}, {}, 0.0), None)
    assert worker._await_decision(save) == (Phase.COMMITTED, "")  # no signal comes: from storage
    assert ("make_durable", keys.journal_key(2)) in storage.calls


def test_a_process_gives_up_writing_once_another_has_said_no_and_leaves_the_cause_to_it(tmp_path: Path) -> None:
    catalog, rendezvous = Catalog(PosixStorage(str(tmp_path)), "w"), connect(1.0)
    writer = ArrayWriter(ArrayOptions(), process=0)
    worker = Saver(catalog, writer, rendezvous, None, Options(), epoch=1, run="r", attest=False, committed=lambda: None)
    save = worker.begin(1, UserData({}, {}, 0.0), None)
    prefix = signal_prefix("r", save.id)
    rendezvous.post(f"{prefix}receipt/1", '{"failure": "disk full"}')
    rendezvous.post(f"{prefix}decision/0", json.dumps({"phase": "ABORTED", "reason": "process 1 said no"}))
    worker.start(save, flatten({"w": jnp.zeros((64, 1 << 20), jnp.uint8)}))
    assert save.thread is not None
    save.thread.join(20)
    assert "process 1 said no" in str(save.error)
    assert set(rendezvous.poll(f"{prefix}receipt/")) == {"1"}
    assert catalog.receipt(save.id, 0) is None


def test_a_process_that_saves_another_step_than_process_0_says_so_to_both_attempts_and_waits_no_longer(
    tmp_path: Path,
) -> None:
    rendezvous = connect(1.0)
    storage = PosixStorage(str(tmp_path))
    unused = cast(Any, None)
    worker = Saver(
        Catalog(storage, "w"),
        unused,
        rendezvous,
        None,
        Options(save_timeout_s=3),
        epoch=1,
        run="r",
        attest=False,
        committed=lambda: None,
    )
    Catalog(storage, "w").append(journal.open_epoch)
    worker.begin(1, UserData({}, {}, 0.0), None)
    rendezvous.post("orchestrator/r/saving/0", json.dumps([1, FIRST]))
    save = worker.begin(3, UserData({}, {}, 0.0), None)
    assert worker._apart(save) is None  # process 0 is behind: this one has been there
    rendezvous.post("orchestrator/r/saving/0", json.dumps([2, FIRST]))
    rendezvous.post(signal_prefix("r", save.id) + "decision/0", "{}")
    assert worker._apart(save) is None  # process 0 has just decided this very attempt, and begun the next
    rendezvous.forget(signal_prefix("r", save.id))
    started = time.monotonic()
    phase, reason = worker._await_decision(save)
    assert time.monotonic() - started < 5
    host = rendezvous.hosts[0]
    said = f"process 0 ({host}) saves step 2 where process 0 ({host}) saves step 3; all must save the same steps"
    assert phase is Phase.ABORTED and reason.startswith(said)
    for step in (2, 3):
        no = decode(
            rendezvous.poll(signal_prefix("r", AttemptId(step, FIRST)) + "receipt/")["0"].encode(), Receipt, "signal"
        )
        assert no.step == step and no.failure is not None and said in no.failure.cause


def test_a_coordinator_that_hears_no_signal_finds_the_receipts_by_listing_them(tmp_path: Path) -> None:
    class Deaf(_Alone):
        def poll(self, prefix: str) -> dict[str, str]:
            return {}

    storage = HookedStorage(PosixStorage(str(tmp_path)))
    with oc.Agent(tmp_path, rendezvous=Deaf(), storage=storage, options=now()) as agent:
        started = time.monotonic()
        agent.save(1, {"w": jnp.zeros(512)})
        assert agent.all_steps() == [1] and time.monotonic() - started < 10
    prefix = AttemptId(1, FIRST).prefix + keys.RECEIPTS
    assert ("list", prefix) in storage.calls
    # Its own it has written itself: neither that nor what is not there yet, of a job of thousands, is read.
    assert [key for operation, key in storage.calls if operation == "get" and key.startswith(prefix)] == []


def test_what_a_save_tells_of_its_progress_counts_small_leaves_too(tmp_path: Path) -> None:
    told: list[SavePhase] = []
    stop = events.subscribe(lambda event: told.append(event) if isinstance(event, SavePhase) else None)
    try:
        with oc.Agent(tmp_path, options=now()) as agent:
            agent.save(1, {f"leaf {number}": jnp.zeros(16) for number in range(100)})
    finally:
        stop()
    written = {event.phase: event.written_bytes for event in told}
    assert written["staging"] == 0
    assert written["sealing"] == written["committing"] == 100 * (64 + 4)  # elements and CRC-32C

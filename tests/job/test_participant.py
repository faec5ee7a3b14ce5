"""A save as the other processes decide it; and nothing reported or deleted because of an entry that could vanish."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import flatten
from orchestrator.errors import WaitTimeout
from orchestrator.job.decision import DecisionReader
from orchestrator.job.finalize import UserData
from orchestrator.job.outcome import Aborted, Committed, Fenced, Outcome
from orchestrator.job.participant import Participants
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.signals import Signals, abort_vote
from orchestrator.observe import events
from orchestrator.observe.events import SavePhase
from orchestrator.options import Options
from orchestrator.policy import last
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Failure
from orchestrator.run import checked_reads
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, Storage
from tests.support.builders import FIRST, live
from tests.support.fakes import FakeBoard, HookedStorage, StepClock
from tests.support.runs import now


def a_run(root: Path) -> JournalStore:
    """Step 1 committed and retired, step 2 committed; step 1's data is there."""
    catalog = JournalStore(PosixStorage(str(root)), "test")
    catalog.append(journal.open_epoch)
    for step in (1, 2):
        catalog.storage.create(AttemptId(step, FIRST).prefix + keys.MANIFEST, b"{}")
        entry = live(step)
        catalog.append(partial(journal.commit, epoch=1, entry=entry, keep=last(1)))
    return catalog


def test_a_collector_makes_the_entry_that_retires_durable_before_it_deletes(tmp_path: Path) -> None:
    storage = HookedStorage(a_run(tmp_path).storage)
    assert collect(JournalStore(storage, "gc")).files == 1
    operations = [call for call in storage.calls if call[0] in ("make_durable", "delete")]
    assert operations[0] == ("make_durable", keys.journal_key(2))
    assert [operation for operation, _ in operations[1:]] == ["delete"]


def test_a_dry_run_of_a_collector_needs_no_right_to_write(tmp_path: Path) -> None:
    storage = HookedStorage(a_run(tmp_path).storage)
    assert collect(JournalStore(storage, "gc"), dry_run=True).files == 1
    assert {operation for operation, _ in storage.calls} <= {"get", "list"}


def test_a_worker_believes_a_commit_that_it_finds_in_the_journal_only_once_it_is_durable(tmp_path: Path) -> None:
    storage = HookedStorage(a_run(tmp_path).storage)
    board = FakeBoard(1, 2)
    reader = DecisionReader(AttemptId(2, FIRST), 1, JournalStore(storage, "w"), Signals(board, "i"), board.hosts)
    assert reader.wait(20.0, lambda: None) == Committed()  # no signal comes: from storage
    assert ("make_durable", keys.journal_key(2)) in storage.calls


@pytest.mark.parametrize(
    ("attempt", "epoch", "outcome"),
    [
        (AttemptId(2, FIRST), 1, Committed()),
        (AttemptId(1, FIRST), 1, Aborted("journal version 2: aborted")),
        (AttemptId(3, FIRST), 1, None),
        (AttemptId(3, FIRST), 0, Fenced("fenced by epoch 1 (test)")),
        (AttemptId(2, FIRST), 0, Committed()),  # another incarnation has opened its epoch since
    ],
)
def test_what_the_journal_says_of_an_attempt(
    attempt: AttemptId, epoch: int, outcome: Outcome | None, tmp_path: Path
) -> None:
    board = FakeBoard(1, 2)
    reader = DecisionReader(attempt, epoch, a_run(tmp_path), Signals(board, "i"), board.hosts)
    assert reader.journalled() == outcome


def test_a_decision_that_does_not_come_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    board, clock = FakeBoard(1, 2), StepClock()
    reader = DecisionReader(AttemptId(3, FIRST), 1, a_run(tmp_path), Signals(board, "i"), board.hosts, clock.clock)
    with pytest.raises(WaitTimeout, match=r"no decision from the coordinator, process 0 \(host-0\), after 7 s"):
        reader.wait(7.0, lambda: None)
    assert sum(clock.slept) == pytest.approx(7.0)


def participants(storage: Storage, board: FakeBoard, **options: Any) -> Participants:
    """Process 1 of two, in epoch 1."""
    writer, signals = ArrayWriter(ArrayOptions(), 1), Signals(board, "i")
    return Participants(JournalStore(storage, "w"), writer, board, signals, None, Options(**options), epoch=1)


def test_a_process_gives_up_writing_once_another_votes_to_abort_and_leaves_the_cause_to_it(tmp_path: Path) -> None:
    board, storage = FakeBoard(1, 2), PosixStorage(str(tmp_path))
    save = participants(storage, board).begin(1, UserData({}, {}, 0.0), None)
    attempt, signals = save.id, Signals(board, "i")
    other = abort_vote(attempt, Failure(process=0, host="host-0", phase="write", cause="disk full"))
    board.process = 0
    signals.vote_abort(other)
    signals.post_decision(attempt, Aborted("process 0 voted to abort"))
    board.process = 1
    save.start(flatten({"w": jnp.zeros((64, 1 << 20), jnp.uint8)}))
    save.join(20)
    assert "process 0 voted to abort" in str(save.error)
    assert signals.votes(attempt) == {0: other}
    assert checked_reads.receipt(storage, attempt, 1) is None


def test_a_process_that_saves_another_step_than_process_0_waits_no_longer(tmp_path: Path) -> None:
    board, storage = FakeBoard(1, 2), PosixStorage(str(tmp_path))
    JournalStore(storage, "w").append(journal.open_epoch)
    signals = Signals(board, "i")
    save = participants(storage, board, save_timeout_s=60).begin(3, UserData({}, {}, 0.0), None)
    signals.post_saving(AttemptId(2, FIRST))
    started = time.monotonic()
    save.start(flatten({"w": jnp.zeros(8)}))
    save.join(20)
    assert isinstance(save.outcome, Aborted) and time.monotonic() - started < 5
    said = "process 0 (host-0) saves step 2 where process 1 (host-1) saves step 3; all must save the same steps"
    assert said in str(save.error)
    for step in (2, 3):
        vote = signals.votes(AttemptId(step, FIRST))[1]
        assert vote and vote.failure and vote.step == step and said in vote.failure.cause


def test_a_coordinator_that_hears_no_signal_finds_the_receipts_by_listing_them(tmp_path: Path) -> None:
    class Deaf(SingleProcess):
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

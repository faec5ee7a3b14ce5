"""One save on one process other than 0: what it votes, what it waits for, and how it ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator import errors
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import flatten
from orchestrator.errors import SaveFailed
from orchestrator.job.finalize import UserData
from orchestrator.job.outcome import Aborted, Committed, Fenced, Outcome
from orchestrator.job.participant import ParticipantFactory
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.signals import Signals, abort_vote
from orchestrator.observe import events
from orchestrator.observe.events import SaveNotCommitted, SavePhase
from orchestrator.options import Options
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Cause, Failure
from orchestrator.run import checked_reads
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, Storage
from tests.support.builders import FIRST
from tests.support.fakes import FakeBoard, HookedStorage
from tests.support.runs import now


def participants(storage: Storage, board: FakeBoard, **options: Any) -> ParticipantFactory:
    """Process 1 of two, in epoch 1."""
    writer, signals = ArrayWriter(ArrayOptions(), 1), Signals(board, "i")
    return ParticipantFactory(JournalStore(storage, "w"), writer, board, signals, None, Options(**options), epoch=1)


@pytest.mark.parametrize(
    ("outcome", "error", "cause"),
    [
        (Committed(), None, None),
        (Aborted("process 0 voted to abort", Cause.REJECTED), SaveFailed, Cause.REJECTED),
        (Aborted("no receipt from processes [2]", Cause.SILENT), SaveFailed, Cause.SILENT),
        (Fenced("fenced by epoch 2 (w)"), errors.Fenced, Cause.FENCED),
    ],
)
def test_a_save_ends_as_process_0_decides(
    outcome: Outcome, error: type[Exception] | None, cause: Cause | None, tmp_path: Path
) -> None:
    board, seen = FakeBoard(1, 2), list[events.Event]()
    save = participants(PosixStorage(str(tmp_path)), board).begin(1, UserData({}, {}, 0.0), None)
    signals = Signals(board, "i")
    signals.post_decision(save.id, outcome)
    ends = (events.SaveCommitted, SaveNotCommitted)
    stop = events.subscribe(lambda event: seen.append(event) if isinstance(event, ends) else None)
    try:
        save.start(flatten({"w": jnp.zeros(8)}))
        save.join(20)
    finally:
        stop()
    assert save.outcome == outcome and signals.votes(save.id) == {1: None}
    if error is None:
        assert save.error is None and save.durable_s > 0
        assert seen == [events.SaveCommitted(1, save.id.name, save.durable_s, 0)]
    else:
        assert type(save.error) is error and outcome.reason in str(save.error)  # type: ignore[union-attr]
        assert seen == [events.SaveNotCommitted(1, save.id.name, str(save.error), cause)]


def test_a_process_stops_writing_once_another_votes_to_abort_and_leaves_it_the_cause(tmp_path: Path) -> None:
    board, storage = FakeBoard(1, 2), PosixStorage(str(tmp_path))
    save = participants(storage, board).begin(1, UserData({}, {}, 0.0), None)
    attempt, signals = save.id, Signals(board, "i")
    other = abort_vote(attempt, Failure(process=0, host="host-0", phase="write", cause="disk full"))
    board.process = 0
    signals.vote_abort(other)
    signals.post_decision(attempt, Aborted("process 0 voted to abort", Cause.DISAGREE))
    board.process = 1
    ended: list[SaveNotCommitted] = []
    stop = events.subscribe(lambda event: ended.append(event) if isinstance(event, SaveNotCommitted) else None)
    save.start(flatten({"w": jnp.zeros((64, 1 << 20), jnp.uint8)}))
    save.join(20)
    stop()
    assert "process 0 voted to abort" in str(save.error)
    assert [event.cause for event in ended] == [Cause.DISAGREE]  # as the decision says, whatever its words
    assert signals.votes(attempt) == {0: other}
    assert checked_reads.receipts(storage, attempt, keys.receipt_name(1)) is None


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

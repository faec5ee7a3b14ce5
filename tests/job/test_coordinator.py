"""What the coordinator decides, returns and posts, for each way in which an attempt can end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
from msgspec import structs

from orchestrator.errors import StorageError
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.decision import DecisionReader
from orchestrator.job.finalize import OwnPart, UserData
from orchestrator.job.outcome import Aborted, Committed, Fenced
from orchestrator.job.signals import Signals, abort_vote
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import Cause, Failure, FileEntry
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import MemoryStorage
from tests.support import builders
from tests.support.fakes import FakeBoard, HookedStorage

INTENT = builders.intent(processes=2, step=1)
ATTEMPT = AttemptId(1, builders.FIRST)
RECEIPTS = [
    builders.receipt(0, step=1, boxes={"w": (builders.box((0, 2)),)}, seconds={"stage": 0.5}),
    builders.receipt(1, step=1, boxes={"w": (builders.box((2, 4)),)}, seconds={"stage": 2.0}),
]
USER = UserData({"loss": 1.0}, {}, 5.0)


class Written:
    """Process 0's own write, as far as the coordinator uses it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def merge(self, entries: object) -> tuple[FileEntry, ...]:
        if self.error:
            raise self.error
        return ()


class Job:
    """An attempt at step 1 of two processes that process 0 has opened and voted in."""

    def __init__(self) -> None:
        self.storage = HookedStorage(MemoryStorage())
        self.store = JournalStore(self.storage, "w")
        self.store.append(journal.open_epoch)
        self.board = FakeBoard(0, 2)
        self.signals = Signals(self.board, "i")
        self.coordinator = Coordinator(self.store, self.board, self.signals, keep=None)
        self.merge_error: Exception | None = None
        self.opened = self.coordinator.open(INTENT, USER)
        self.store_receipt(0)
        self.signals.vote(ATTEMPT)

    def store_receipt(self, process: int, body: bytes = b"") -> None:
        key = ATTEMPT.receipt_key(process)
        self.storage.create(key, body or encode(RECEIPTS[process]))

    def vote(self, process: int, text: str = "yes") -> None:
        self.board.posted[f"orchestrator/i/1/{builders.FIRST}/receipt/{process}"] = text

    def decide(self, timeout_s: float = 20.0) -> Any:
        own = OwnPart(INTENT, USER, cast(Any, Written(self.merge_error)), self.opened, encode(RECEIPTS[0]))
        return self.coordinator.decide(own, timeout_s)


def all_in(job: Job) -> None:
    job.store_receipt(1)
    job.vote(1)


def lost_signal(job: Job) -> None:
    job.store_receipt(1)


def abort_vote_by_signal(job: Job) -> None:
    failure = Failure(process=1, host="host-1", phase="write", cause="OSError: disk full")
    job.vote(1, encode(abort_vote(ATTEMPT, failure)).decode())


def stored_abort_vote(job: Job) -> None:
    failure = Failure(process=1, host="host-1", phase="write", cause="OSError: disk full")
    job.store_receipt(1, encode(abort_vote(ATTEMPT, failure)))


def hung(job: Job) -> None:
    failure = Failure(process=1, host="host-1", phase="wait", cause="step 0 still hangs", kind=Cause.HUNG)
    job.vote(1, encode(abort_vote(ATTEMPT, failure)).decode())


def garbage_by_signal(job: Job) -> None:
    job.vote(1, '{"failure": "disk full"}')


def damaged_receipt(job: Job) -> None:
    job.store_receipt(1, encode(RECEIPTS[1])[:-3])
    job.vote(1)


def gap(job: Job) -> None:
    job.store_receipt(1, encode(structs.replace(RECEIPTS[1], boxes={"w": (builders.box((3, 4)),)})))
    job.vote(1)


def silence(job: Job) -> None:
    pass


def merge_fails(job: Job) -> None:
    all_in(job)
    job.merge_error = OSError("merge")


def newer_epoch(job: Job) -> None:
    all_in(job)
    JournalStore(job.storage, "newer").append(journal.open_epoch)


def newer_epoch_and_abort(job: Job) -> None:
    abort_vote_by_signal(job)
    JournalStore(job.storage, "newer").append(journal.open_epoch)


ABORTS: list[tuple[Callable[[Job], None], str, str]] = [
    (abort_vote_by_signal, "refused", "process 1 (host-1) in write: OSError: disk full"),
    (stored_abort_vote, "refused", "process 1 (host-1) in write: OSError: disk full"),
    (garbage_by_signal, "refused", "process 1 (host-1) in receipt: signal of process 1: "),
    (damaged_receipt, "refused", "process 1 (host-1) in receipt: "),
    (hung, "hung", "process 1 (host-1) in wait: step 0 still hangs"),
    (gap, "incomplete", "elements written"),
    (silence, "silent", "no receipt from processes [1 (host-1)] after 0.05 s"),
    (merge_fails, "finalize", "process 0 (host-0) in finalize: OSError: merge"),
]


@pytest.mark.parametrize("happens", [all_in, lost_signal])
def test_a_step_whose_receipts_are_all_in_is_committed(happens: Callable[[Job], None]) -> None:
    job = Job()
    happens(job)
    outcome = job.decide()
    head = job.store.require_head()
    assert [live.step for live in head.live] == [1] and head.live[0].metrics == {"loss": 1.0}
    assert outcome == Committed(state_bytes=head.live[0].bytes, stage_s=2.0, quarantined=0)
    assert job.signals.decision(ATTEMPT) == Committed()


@pytest.mark.parametrize(("happens", "cause", "reason"), ABORTS, ids=[row[0].__name__ for row in ABORTS])
def test_an_abort_is_journalled_posted_and_names_its_cause(
    happens: Callable[[Job], None], cause: str, reason: str
) -> None:
    job = Job()
    happens(job)
    outcome = job.decide(0.05 if happens is silence else 20.0)
    assert isinstance(outcome, Aborted) and outcome.cause is Cause(cause) and reason in outcome.reason
    assert job.signals.decision(ATTEMPT) == outcome
    head = job.store.require_head()
    assert head.live == () and head.event.kind == "aborted" and journal.is_retired(head, ATTEMPT)
    late = DecisionReader(ATTEMPT, 1, job.store, job.signals, job.board.hosts).journalled()
    assert isinstance(late, Aborted) and late.cause is outcome.cause, "a process that missed the signal counts another"


@pytest.mark.parametrize("happens", [newer_epoch, newer_epoch_and_abort])
def test_a_coordinator_of_an_older_epoch_changes_nothing(happens: Callable[[Job], None]) -> None:
    job = Job()
    happens(job)
    before = job.store.versions()
    outcome = job.decide()
    assert isinstance(outcome, Fenced) and "fenced by epoch 2 (newer)" in outcome.reason
    assert job.signals.decision(ATTEMPT) == outcome and job.store.versions() == before


def test_the_others_hear_of_an_outcome_that_could_not_be_journalled() -> None:
    job = Job()
    all_in(job)

    def fails(operation: str, key: str) -> None:
        if operation == "create" and key.startswith(keys.JOURNAL):
            raise StorageError("the disk is full")

    job.storage.before = fails
    with pytest.raises(StorageError, match="the disk is full"):
        job.decide()
    posted = job.signals.decision(ATTEMPT)
    assert isinstance(posted, Aborted) and "could not be journalled: the disk is full" in posted.reason


def test_nothing_of_one_attempt_is_kept_for_the_next() -> None:
    job = Job()
    all_in(job)
    before = {name: value for name, value in vars(job.coordinator).items() if name != "_notices"}
    job.decide()
    assert {name: value for name, value in vars(job.coordinator).items() if name != "_notices"} == before


def test_all_in_is_called_only_before_a_commit() -> None:
    for happens, called in ((all_in, ["commit"]), (abort_vote_by_signal, [])):
        job, calls = Job(), list[str]()
        happens(job)
        own = OwnPart(INTENT, USER, cast(Any, Written()), job.opened, encode(RECEIPTS[0]))
        job.coordinator.decide(own, 20.0, partial(calls.append, "commit"))
        assert calls == called

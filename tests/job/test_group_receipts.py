"""Receipts that are signed in groups: one object for a group, whatever message is lost and whoever is late or dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from msgspec import structs

from orchestrator.errors import StorageError
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.finalize import OwnPart, UserData
from orchestrator.job.group_receipts import ReceiptSigning, Work
from orchestrator.job.outcome import Aborted, Committed
from orchestrator.job.signals import Signals
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.receipt_groups import Bounds, Group
from orchestrator.rules.records import FileEntry, GroupReceipt, Receipt
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import MemoryStorage
from tests.support import builders
from tests.support.fakes import FailOnce, FakeBoard, HookedStorage, StepClock

ATTEMPT = AttemptId(1, builders.FIRST)
OLDER = AttemptId.of(1, 0, 1)
COUNT = 4
GROUP = Group((1, 2, 3))
BOUNDS = Bounds(sign_s=5.0, hand_s=10.0)
INTENT = builders.intent(processes=COUNT, step=1)


def receipt_of(process: int) -> Receipt:
    return builders.receipt(process, step=1, boxes={"w": (builders.box((process, process + 1)),)})


class Own:
    """A process's contribution, as far as signing uses it."""

    def __init__(self, storage: HookedStorage, process: int) -> None:
        self.receipt, self._storage = receipt_of(process), storage
        self.signed = encode(self.receipt)

    def store_receipt(self) -> bytes:
        self._storage.create(ATTEMPT.receipt_key(self.receipt.process), self.signed)
        return self.signed


class Job:
    """Four processes: 0, and a group of the others."""

    def __init__(self) -> None:
        self.storage, self.time = HookedStorage(MemoryStorage()), StepClock()
        self.store = JournalStore(self.storage, "w")
        self.store.append(journal.open_epoch)
        self.posted: dict[str, str] = {}
        self.signals = [self._signals(process) for process in range(COUNT)]
        self.works: dict[int, Work] = {}

    def _signals(self, process: int) -> Signals:
        board = FakeBoard(process, COUNT)
        board.posted = self.posted
        return Signals(board, "i")

    def signing(self, process: int) -> ReceiptSigning:
        group = GROUP if process else None
        return ReceiptSigning(self.store, self.signals[process], process, COUNT, group, BOUNDS, self.time.clock)

    def sign(self, *processes: int) -> None:
        for process in processes:
            own = cast(Any, Own(self.storage, process))
            self.works[process] = self.signing(process).sign(ATTEMPT, own)

    def work(self, after_s: float = 0.0) -> None:
        self.time.now_s += after_s
        for work in self.works.values():
            work()

    @property
    def stored(self) -> dict[str, list[int]]:
        """Name -> whose receipts are in it."""
        found: dict[str, list[int]] = {}
        for entry in self.storage.list(ATTEMPT.receipts_prefix):
            name, body = entry.key.removeprefix(ATTEMPT.prefix), self.storage.get(entry.key)
            assert body is not None
            group = keys.group_of(name)
            inside = decode(body, GroupReceipt, name).receipts if group else (decode(body, Receipt, name),)
            found[name] = [one.process for one in inside]
        return found

    def decide(self, timeout_s: float = 20.0) -> Any:
        class Written:
            def merge(self, entries: object) -> tuple[FileEntry, ...]:
                return ()

        coordinator = Coordinator(self.store, FakeBoard(0, COUNT), self.signals[0], keep=None)
        opened = coordinator.open(INTENT, UserData({}, {}, 0.0))
        own = Own(self.storage, 0)
        self.signing(0).sign(ATTEMPT, cast(Any, own))
        part = OwnPart(INTENT, UserData({}, {}, 0.0), cast(Any, Written()), opened, own.signed)
        return coordinator.decide(part, timeout_s)


FIRST_OF_GROUP, SECOND_OF_GROUP = keys.group_receipt_name(1, 1), keys.group_receipt_name(1, 2)


def test_a_group_whose_members_are_all_there_stores_one_object() -> None:
    job = Job()
    job.sign(2, 1, 3)
    job.work()
    assert job.stored == {FIRST_OF_GROUP: [1, 2, 3]}
    job.work(after_s=1000)
    assert job.stored == {FIRST_OF_GROUP: [1, 2, 3]}, "what was stored once is stored again"


def test_a_leader_waits_for_a_slow_member_and_stores_what_it_has_in_time() -> None:
    job = Job()
    job.sign(1, 2)
    job.work(after_s=4.9)
    assert job.stored == {}
    job.work(after_s=0.1)
    assert job.stored == {FIRST_OF_GROUP: [1, 2]}
    job.sign(3)
    job.work()
    assert job.stored == {FIRST_OF_GROUP: [1, 2], SECOND_OF_GROUP: [3]}


def test_members_behind_a_slow_one_are_stored_in_time_too() -> None:
    job = Job()
    job.sign(1, 3)
    job.work(after_s=5.0)
    assert job.stored == {FIRST_OF_GROUP: [1, 3]}


def test_members_of_a_dead_leader_store_their_receipts_themselves() -> None:
    job = Job()
    job.sign(2, 3)
    job.work(after_s=9.9)
    assert job.stored == {}
    job.work(after_s=0.1)
    assert job.stored == {keys.receipt_name(2): [2], keys.receipt_name(3): [3]}
    assert job.signals[0].votes(ATTEMPT) == {2: None, 3: None}


def lost(job: Job) -> None:
    """The message of process 2."""
    job.posted = {key: value for key, value in job.posted.items() if "/part/2/" not in key}


def garbled(text: str) -> Callable[[Job], None]:
    def change(job: Job) -> None:
        (key,) = (key for key in job.posted if "/part/2/" in key)
        job.posted[key] = text

    return change


def anothers(job: Job) -> None:
    """Process 2 has posted process 3's receipt."""
    parts = {key.split("/part/")[1][0]: key for key in job.posted if "/part/" in key}
    job.posted[parts["2"]] = job.posted[parts["3"]]


@pytest.mark.parametrize(
    "happens", [lost, garbled(""), garbled("\x00"), garbled("{}"), garbled("0" * 100), garbled("\ud800"), anothers]
)
def test_what_does_not_arrive_whole_is_stored_by_its_process(happens: Callable[[Job], None]) -> None:
    job = Job()
    job.sign(2, 3)
    happens(job)
    for signals in job.signals:
        cast(Any, signals)._board.posted = job.posted
    job.sign(1)
    for _ in range(3):
        job.work(after_s=5.0)
    assert job.stored == {FIRST_OF_GROUP: [1, 3], keys.receipt_name(2): [2]}
    assert isinstance(job.decide(), Committed)


def test_a_receipt_that_is_too_large_for_a_message_is_stored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.job.signals.PART_BYTES_MAX", 10)
    job = Job()
    job.sign(2)
    assert job.stored == {keys.receipt_name(2): [2]} and job.signals[0].votes(ATTEMPT) == {2: None}


def test_a_part_of_another_attempt_is_not_signed() -> None:
    job = Job()
    job.signals[2].hand_over(ATTEMPT, encode(structs.replace(receipt_of(2), attempt=OLDER.name)))
    job.signals[3].hand_over(OLDER, encode(receipt_of(3)))
    job.sign(1)
    job.work(after_s=5.0)
    assert job.stored == {FIRST_OF_GROUP: [1]}


def test_a_leader_that_cannot_store_raises_and_its_members_store_theirs() -> None:
    job = Job()
    job.sign(1, 2, 3)
    job.storage.before = FailOnce("create", FIRST_OF_GROUP)
    with pytest.raises(StorageError, match="ENOSPC"):
        job.works[1]()
    del job.works[1]
    job.work(after_s=10.0)
    assert job.stored == {keys.receipt_name(2): [2], keys.receipt_name(3): [3]}


@pytest.mark.parametrize("signal", [True, False], ids=["voted", "listed"])
@pytest.mark.parametrize("late", [False, True], ids=["in one", "in two"])
def test_a_step_is_committed_with_its_groups_receipts(signal: bool, late: bool) -> None:
    job = Job()
    job.sign(1, 2, *((3,) if not late else ()))
    job.work(after_s=5.0)
    job.sign(*((3,) if late else ()))
    job.work()
    if not signal:
        for key in [key for key in job.posted if "/receipt/" in key]:
            del job.posted[key]
    assert isinstance(job.decide(), Committed)
    (live,) = job.store.require_head().live
    step = job.store.step(live)
    assert [receipt.process for receipt in step.receipts()] == [0, 1, 2, 3]
    listed = [entry.path for entry in step.manifest.files if entry.path.startswith(keys.RECEIPTS)]
    assert sorted(listed) == sorted(job.stored) and len(listed) == (3 if late else 2)
    assert step.manifest.hosts == ("host-0", "host-1", "host-2", "host-3")
    step.check_sizes()


def test_a_process_whose_receipt_is_stored_twice_counts_once() -> None:
    job = Job()
    job.sign(1, 2, 3)
    job.work()
    Own(job.storage, 3).store_receipt()  # a member that did not hear of its leader in time
    job.signals[3].vote(ATTEMPT)
    assert isinstance(job.decide(), Committed)
    step = job.store.step(job.store.require_head().live[0])
    assert [receipt.process for receipt in step.receipts()] == [0, 1, 2, 3]


def damaged(job: Job) -> None:
    del job.works[1]
    job.storage.create(ATTEMPT.key(FIRST_OF_GROUP), b"{}")
    job.signals[1].vote_for_group(ATTEMPT, 1, [1, 2, 3])


def of_another_leader(job: Job) -> None:
    del job.works[1]
    body = encode(builders.group_receipt(*map(receipt_of, (1, 2, 3)), process=2))
    job.storage.create(ATTEMPT.key(FIRST_OF_GROUP), body)
    job.signals[1].vote_for_group(ATTEMPT, 1, [1, 2, 3])


def silent_member(job: Job) -> None:
    del job.works[3]
    job.posted = {key: value for key, value in job.posted.items() if "/part/3/" not in key}
    for signals in job.signals:
        cast(Any, signals)._board.posted = job.posted


def dead_leader(job: Job) -> None:
    del job.works[1]


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (damaged, "process 1 (host-1) in receipt"),
        (of_another_leader, "process 1 (host-1) in receipt"),
        (silent_member, "no receipt from processes [3 (host-3)]"),
        (dead_leader, "no receipt from processes [1 (host-1)]"),
    ],
)
def test_an_abort_names_the_process_at_fault_and_not_its_group(happens: Callable[[Job], None], reason: str) -> None:
    job = Job()
    job.sign(1, 2, 3)
    happens(job)
    for _ in range(2):
        job.work(after_s=5.0)
    outcome = job.decide(1.5)  # long enough to list the store once
    assert isinstance(outcome, Aborted) and reason in outcome.reason
    assert len(job.store.require_head().event.failures) == 1

"""What does not need another's answer is asked for at the same time: a far store takes as long for all as for one."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import orchestrator as oc
from launch.gcs_emulator.request_log import chain
from orchestrator.errors import Fenced, JournalLost, StorageError
from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import Stamp
from orchestrator.run.journal_store import EARLY_S, JournalStore
from orchestrator.storage import MemoryStorage, PosixStorage, open_storage, overlap
from tests.support.fakes import HookedStorage
from tests.support.gcs import emulator, new_root
from tests.support.waves import InWaves

STATE = {"w": jnp.arange(1024.0), "small": jnp.ones(3)}
LIKE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), STATE)
ENTRY, HEAD = r"journal/\d+\.json", (r"list journal/", r"get journal/\d+\.json")
ATTEMPT = r"steps/\d+/e\d+-a\d+"
RECORDS = tuple(f"get {ATTEMPT}/{name}" for name in (r"manifest\.json", r"intent\.json", r"extra\.json"))
PROCESS = f"get {ATTEMPT}/process/00000.bin"
# In a bucket the arrays add: their writes, to a save's first wave; the tree's, before its last sync; the tree's reads
# and theirs, after a restore's records.
OPEN = (["list journal-index/"], ["list journal/"], [f"get {ENTRY}"])
RESUME = (
    HEAD,
    (*RECORDS, f"list {ATTEMPT}/"),
    ("list steps/", "list journal-index/"),
    (*HEAD, "list journal/"),
    (r"create steps/\.probe-.*",),
    (r"delete steps/\.probe-.*", f"create {ENTRY}"),
    (*HEAD, PROCESS),
    (f"create {ENTRY}",),
)
AGAIN = (HEAD, (*RECORDS, f"list {ATTEMPT}/"), (PROCESS,))
SAVE = (
    [f"create {ATTEMPT}/{name}" for name in (r"intent\.json", r"extra\.json", r"process/00000\.bin")],
    ["make_durable 00000.bin .*"],
    [f"create {ATTEMPT}/receipts/00000.json"],
    [*HEAD, r"make_durable .*00000\.json"],
    [f"create {ATTEMPT}/manifest.json"],
    [f"create {ENTRY}"],
)


def test_no_request_waits_for_an_answer_that_it_does_not_need(tmp_path: Path) -> None:
    options = oc.Options(async_save=False, on_save_failure="raise")
    with oc.Agent(tmp_path, options=options) as agent:
        agent.save(1, STATE, process_state=b"mine")
    store = InWaves(PosixStorage(str(tmp_path)))
    with store.expecting(*OPEN):
        agent = oc.Agent(tmp_path, options=options, storage=store)
    for waves in (RESUME, AGAIN):
        with store.expecting(*waves):
            restored = agent.restore(LIKE)
        assert restored and restored.step == 1 and restored.process_states == {0: b"mine"}
        assert (restored.state["w"] == STATE["w"]).all()
    agent.save(2, STATE)  # its tree is compared, and older incarnations' leftovers are collected, once
    agent._deletion.wait(60)
    with store.expecting(*SAVE):
        agent.save(3, STATE, process_state=b"mine")
    agent.close()
    assert oc.open_run(tmp_path).all_steps() == [1, 2, 3]


# A head that was read ahead.


def a_run(store: MemoryStorage) -> JournalStore:
    journal_store = JournalStore(store, "a")
    journal_store.append(journal.open_epoch)
    return journal_store


def test_a_head_that_was_read_ahead_is_built_on_by_one_create() -> None:
    store = HookedStorage(MemoryStorage())
    journal_store = a_run(store)
    early = overlap.known(journal_store.head(), began_s=overlap.begin(lambda: None).began_s)
    store.calls.clear()
    made = journal_store.append(journal.open_epoch, early)
    assert made and made.epoch == 2 and [operation for operation, _ in store.calls] == ["create"]


def overtake(store: MemoryStorage) -> None:
    JournalStore(store, "b").append(journal.open_epoch)


def replace(store: MemoryStorage) -> None:
    """Somebody deletes the run, and begins another one there."""
    for entry in list(store.list("")):
        store.delete(entry.key)
    JournalStore(store, "b").append(journal.open_epoch)


def empty(store: MemoryStorage) -> None:
    for entry in list(store.list("")):
        store.delete(entry.key)


COMMIT = partial(journal.abort, epoch=3, attempt=AttemptId(1, "e0003-a01"), failures=(), reason="no")


@pytest.mark.parametrize(
    ("happens", "age_s", "raises"),
    [
        (overtake, 0.0, Fenced),  # the create is in conflict: decided again
        (overtake, EARLY_S + 1, Fenced),  # too old: read again
        (empty, EARLY_S + 1, JournalLost),
        (replace, EARLY_S + 1, JournalLost),
    ],
)
def test_no_decision_rests_on_a_head_that_is_no_more(happens: object, age_s: float, raises: type[Exception]) -> None:
    store = MemoryStorage()
    journal_store = a_run(store)
    for _ in range(2):
        journal_store.append(journal.open_epoch)
    head = journal_store.head()
    assert head and head.epoch == 3
    now_s = overlap.begin(lambda: None).began_s
    happens(store)  # type: ignore[operator]
    before = {entry.key: store.get(entry.key) for entry in store.list("")}
    with pytest.raises(raises):
        journal_store.append(COMMIT, overlap.known(head, now_s - age_s))
    assert {entry.key: store.get(entry.key) for entry in store.list("")} == before


@pytest.mark.parametrize("early", ["of an older epoch", "of a newer epoch", "of no run", "unread"])
def test_nobody_is_rejected_for_what_was_read_ahead(early: str) -> None:
    """What is not a create is decided by a head that is read now."""
    store = MemoryStorage()
    journal_store = a_run(store)
    older = journal_store.head()
    assert older
    head = journal_store.append(journal.open_epoch)
    assert head
    now_s = overlap.begin(lambda: None).began_s

    def fails() -> None:
        raise StorageError("not now")

    heads = {
        "of an older epoch": older,
        "of a newer epoch": journal.open_epoch(head, Stamp("x", 0.0, "x")),
        "of no run": None,
    }
    given = overlap.begin(fails) if early == "unread" else overlap.known(heads[early], now_s)
    rule = partial(journal.abort, epoch=2, attempt=AttemptId(1, "e0002-a01"), failures=(), reason="no")
    made = journal_store.append(rule, given)  # type: ignore[arg-type]
    assert made and made.version == head.version + 1 and made.retired[0].attempt == "e0002-a01"


# Overlapping.


def test_calls_overlap_and_the_first_error_in_order_is_raised() -> None:
    barrier = threading.Barrier(3, timeout=30)

    def meets(error: Exception | None) -> int:
        barrier.wait()
        if error:
            raise error
        return 1

    assert overlap.together(*(partial(meets, None) for _ in range(3))) == [1, 1, 1]
    with pytest.raises(StorageError, match="second"):
        overlap.together(partial(meets, None), partial(meets, StorageError("second")), partial(meets, ValueError()))


# How waves are counted.


def test_the_emulator_logs_when_each_request_came_and_was_answered() -> None:
    running, store = emulator(), open_storage(new_root())
    running.counts(reset=True)
    running.set_faults(slow=1, slow_s=0.05)
    try:
        store.create("a", b"1")
        assert store.get("a") == b"1"
    finally:
        running.set_faults()
    log = json.loads(running.ask("GET", "/_emulator/requests")[2])
    where = store.url.split("/", 3)[3]
    assert [(one["operation"], one["name"]) for one in log] == [("insert", f"{where}/a"), ("media", f"{where}/a")]
    assert all(one["ended_s"] - one["began_s"] >= 0.05 for one in log) and len(chain(log)) == 2
    running.counts(reset=True)
    assert json.loads(running.ask("GET", "/_emulator/requests")[2]) == []


@pytest.mark.parametrize(
    ("intervals", "waves"),
    [
        ([], 0),
        ([(0, 1)], 1),
        ([(0, 1), (0, 1), (0.5, 1.5)], 1),
        ([(0, 1), (1, 2), (0, 2)], 2),
        ([(0, 9), (1, 2), (3, 4), (5, 6)], 3),
        ([(0, 1), (1, None)], 1),
    ],
)
def test_waves_are_the_longest_chain_of_answered_requests(
    intervals: list[tuple[float, float | None]], waves: int
) -> None:
    assert len(chain([{"began_s": began, "ended_s": ended} for began, ended in intervals])) == waves

"""Opening a step: its records are checked against what is above them, and whatever can be wrong has its own error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import Extra, Head, LeafSpec, Manifest, Record, crc32c, file_entry
from orchestrator.run.checked_reads import READS
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import Entry, MemoryStorage
from tests.support import builders
from tests.support.fakes import HookedStorage

ID = AttemptId(7, builders.FIRST)
RECEIPT, STATE = keys.receipt_name(0), keys.process_state_name(0)
NUMBER = LeafSpec(path=("n",), kind="int", value="1")
Bodies = dict[str, bytes]


def extra(step: int = 7) -> Extra:
    return Extra(format=1, write_id="e", step=step, timestamp=1.0, stored_metrics={}, stored_extra={"at": step})


def bodies(**changed: Record | bytes | None) -> Bodies:
    """The files of a whole step without arrays, but for those that are `changed`; None leaves one out."""
    records: dict[str, Any] = {
        keys.INTENT: builders.intent(NUMBER, step=7),
        keys.EXTRA: extra(),
        RECEIPT: builders.receipt(0, step=7),
        STATE: b"where the loader was",
    }
    records |= {
        {"intent": keys.INTENT, "extra": keys.EXTRA, "receipt": RECEIPT}[name]: one for name, one in changed.items()
    }
    return {name: one if isinstance(one, bytes) else encode(one) for name, one in records.items() if one is not None}


def manifest(files: Mapping[str, bytes], **changed: Any) -> Manifest:
    listed = tuple(file_entry(name, body) for name, body in files.items())
    plain: dict[str, Any] = {"step": 7, "attempt": ID.name, "process_count": 1, "files": listed}
    return Manifest(format=1, write_id="m", hosts=("host-0",), seconds=({},), **{**plain, **changed})


def stored(files: Bodies, listed: Manifest | bytes | None = None) -> MemoryStorage:
    """A run whose step 7 has these files, and this manifest or one of the very files, whose checksum is journalled."""
    body = listed if isinstance(listed, bytes) else encode(listed or manifest(files))
    storage = MemoryStorage()
    store = JournalStore(storage, "test")
    store.append(journal.open_epoch)
    for name, content in {**files, keys.MANIFEST: body}.items():
        storage.create(ID.prefix + name, content)
    entry = builders.live(7, manifest_crc32c=crc32c(body))
    append_blindly(store, partial(journal.commit, epoch=1, entry=entry, keep=None))
    return storage


def append_blindly(store: JournalStore, rule: journal.Rule) -> None:
    """Without a look at the run first, which reads the manifests that are forged here."""
    made = rule(store.head(), store.stamp())
    assert isinstance(made, Head) and store.put(made)


def opened(storage: Any) -> StoredStep:
    store = JournalStore(storage, "reader")
    return store.step(store.require_head().live[-1])


def replaced(storage: MemoryStorage, name: str, body: bytes | None) -> MemoryStorage:
    """What stands under a name is another than was journalled."""
    storage.delete(ID.prefix + name)
    if body is not None:
        storage.create(ID.prefix + name, body)
    return storage


def test_a_whole_step_gives_its_records_and_reads_each_once() -> None:
    storage = HookedStorage(stored(bodies()))
    step = opened(storage)
    storage.calls.clear()
    for _ in range(2):
        step.check_sizes()
        assert (step.intent.step, step.extra.extra, step.manifest.step) == (7, {"at": 7}, 7)
    assert [one.process for one in step.receipts()] == [0]
    assert step.process_states() == {0: b"where the loader was"}
    read = [key.removeprefix(ID.prefix) for operation, key in storage.calls if operation == "get"]
    assert sorted(read) == sorted([keys.MANIFEST, keys.INTENT, keys.EXTRA, RECEIPT, STATE])


def test_what_is_read_ahead_is_not_read_again() -> None:
    storage = HookedStorage(stored(bodies()))
    step = opened(storage)
    step.read_ahead()
    step.check_sizes()
    assert step.intent and step.extra
    counts = {key: storage.calls.count(("get", ID.prefix + key)) for key in (keys.MANIFEST, keys.INTENT, keys.EXTRA)}
    assert set(counts.values()) == {1} and storage.calls.count(("list", ID.prefix)) == 1


def test_opening_a_step_reads_nothing() -> None:
    storage = HookedStorage(stored(bodies()))
    store = JournalStore(storage, "reader")
    live = store.require_head().live[-1]
    storage.calls.clear()
    store.step(live)
    assert storage.calls == []


READ: dict[str, Callable[[StoredStep], object]] = {
    "manifest": lambda step: step.manifest,
    "intent": lambda step: step.intent,
    "extra": lambda step: step.extra,
    "receipts": lambda step: step.receipts(),
    "process states": lambda step: step.process_states(),
    "sizes": lambda step: step.check_sizes(),
    "files": lambda step: step.check_files("", (0, 1)),
    "judge": lambda step: step.judge([], []),
}
LARGE = builders.intent(builders.leaf(shape=(1 << 40,)), step=7)
TWO = builders.intent(NUMBER, step=7, processes=2)
OTHER_STEP = builders.intent(NUMBER, step=8)
GONE: dict[str, tuple[Callable[[], MemoryStorage], str, str]] = {
    "no manifest": (lambda: replaced(stored(bodies()), keys.MANIFEST, None), "manifest", "is missing"),
    "another manifest": (
        lambda: replaced(stored(bodies()), keys.MANIFEST, encode(manifest({}))),
        "manifest",
        r"crc32c is \w+, the journal says",
    ),
    "a manifest that is cut": (
        lambda: stored(bodies(), encode(manifest(bodies()))[:-5]),
        "manifest",
        "do not end in a checksum",
    ),
    "another step's manifest": (
        lambda: stored(bodies(), manifest(bodies(), step=8)),
        "manifest",
        "says it is step 8, expected 7",
    ),
    "another attempt's manifest": (
        lambda: stored(bodies(), manifest(bodies(), attempt="e0001-a02")),
        "manifest",
        "says it is attempt e0001-a02, expected e0001-a01",
    ),
    "no intent listed": (lambda: stored(bodies(intent=None)), "intent", r"intent\.json: is missing"),
    "no intent": (lambda: replaced(stored(bodies()), keys.INTENT, None), "intent", "is missing, the manifest says"),
    "another intent": (
        lambda: replaced(stored(bodies()), keys.INTENT, encode(TWO)),
        "intent",
        "the manifest says",
    ),
    "another step's intent": (lambda: stored(bodies(intent=OTHER_STEP)), "intent", "says it is step 8, expected 7"),
    "an intent of more processes": (lambda: stored(bodies(intent=TWO)), "intent", "process_count"),
    "an intent of arrays that are not there": (lambda: stored(bodies(intent=LARGE)), "intent", r"w: .*; not used"),
    "no extra": (lambda: replaced(stored(bodies()), keys.EXTRA, None), "extra", "is missing, the manifest says"),
    "another step's extra": (lambda: stored(bodies(extra=extra(8))), "extra", "says it is step 8, expected 7"),
    "another process's receipt": (
        lambda: stored(bodies(receipt=builders.receipt(1, step=7))),
        "receipts",
        "says it is process 1, expected 0",
    ),
    "a receipt that is no record": (lambda: stored(bodies(receipt=b"{}")), "receipts", "do not end in a checksum"),
    "no process state": (lambda: replaced(stored(bodies()), STATE, None), "process states", "is missing"),
    "a shorter process state": (lambda: replaced(stored(bodies()), STATE, b"w"), "sizes", "has 1 bytes with crc32c"),
    "a file that is gone": (lambda: replaced(stored(bodies()), STATE, None), "sizes", "is missing, the manifest says"),
    "a changed file": (lambda: replaced(stored(bodies()), STATE, b"where the loader is!"), "files", "with crc32c"),
    "a changed file, judged": (
        lambda: replaced(stored(bodies()), STATE, b"where the loader is!"),
        "judge",
        "with crc32c",
    ),
}


@pytest.mark.parametrize("case", GONE)
def test_what_is_proven_to_be_wrong_is_damaged_and_names_the_file(case: str) -> None:
    make, asked, text = GONE[case]
    with pytest.raises(oc.Damaged, match=text) as caught:
        READ[asked](opened(make()))
    assert str(caught.value).startswith(f"memory:///{ID.prefix}"), caught.value


@pytest.mark.parametrize("asked", READ)
def test_what_retention_has_deleted_is_retired_and_not_damaged(asked: str) -> None:
    storage = stored(bodies())
    step = opened(storage)
    newer = JournalStore(storage, "job")
    append_blindly(newer, partial(journal.commit, epoch=1, entry=builders.live(8), keep=oc.last(1)))
    for name in (*bodies(), keys.MANIFEST):
        storage.delete(ID.prefix + name)
    with pytest.raises(oc.StepRetired, match=r"step 7 e0001-a01: was retired while it was read; the newest is step 8"):
        READ[asked](step)


@pytest.mark.parametrize("asked", READ)
def test_a_store_that_does_not_answer_says_nothing_about_the_step(asked: str) -> None:
    step = opened(storage := HookedStorage(stored(bodies())))

    def fail(operation: str, key: str) -> None:
        raise StorageError(f"{operation} {key}: no route to host")

    storage.before = fail
    with pytest.raises(StorageError, match="no route to host") as caught:
        READ[asked](step)
    assert not isinstance(caught.value, oc.Damaged)


class Wrong(HookedStorage):
    """Gives `body` for `name` when it is first read, or each time; its own account of it stays right."""

    def __init__(self, inner: MemoryStorage, name: str, body: bytes | None, times: int) -> None:
        super().__init__(inner)
        self.name, self.body, self.left = name, body, times

    def get(self, key: str, *most_bytes: int) -> bytes | None:
        if key == ID.prefix + self.name and self.left:
            self.left -= 1
            return self.body
        return super().get(key, *most_bytes)


@pytest.mark.parametrize("body", [None, b"", b"another"])
@pytest.mark.parametrize(("name", "asked"), [(keys.MANIFEST, "manifest"), (keys.INTENT, "intent"), (STATE, "files")])
def test_a_wrong_answer_is_asked_again_and_never_damage(name: str, asked: str, body: bytes | None) -> None:
    READ[asked](opened(Wrong(stored(bodies()), name, body, times=1)))
    with pytest.raises(Unavailable, match=f"when read {READS} times, but the store's own account is right") as caught:
        READ[asked](opened(Wrong(stored(bodies()), name, body, times=10**9)))
    assert not isinstance(caught.value, oc.Damaged)


def test_a_step_that_no_journal_lists_can_be_read_by_whoever_says_so() -> None:
    """Recovery reads attempts that the journal has lost."""
    storage = stored(bodies())
    live = JournalStore(storage, "reader").require_head().live[-1]
    for entry in list(storage.list(keys.JOURNAL)):
        storage.delete(entry.key)
    step = StoredStep(storage, live, check_live=lambda live: None)
    step.check_sizes()
    assert step.intent.step == 7
    replaced(storage, STATE, None)
    with pytest.raises(oc.Damaged, match="is missing"):
        step.check_sizes()
    with pytest.raises(oc.JournalLost):  # a reader's step asks the journal before it calls anything damage
        JournalStore(storage, "reader").step(live).check_sizes()


def test_the_error_names_the_file_as_the_manifest_does() -> None:
    with pytest.raises(oc.Damaged) as caught:
        opened(replaced(stored(bodies()), STATE, None)).check_sizes()
    assert caught.value.files == (STATE,)


class StaleListing(HookedStorage):
    """Its listings of attempts lack a file that is there."""

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        found = super().list(prefix, start)
        return (entry for entry in found if entry.key != ID.prefix + STATE)


def test_a_listing_that_is_behind_is_no_damage_and_no_reason_to_go_on() -> None:
    step = opened(StaleListing(stored(bodies())))
    with pytest.raises(Unavailable, match=rf"{READS} listings show no bytes, the store's own account is 20"):
        step.check_sizes()


def test_a_listing_of_a_step_that_is_being_deleted_is_a_retired_step() -> None:
    storage = stored(bodies())
    step = opened(StaleListing(storage))
    newer = builders.live(8)
    append_blindly(JournalStore(storage, "job"), partial(journal.commit, epoch=1, entry=newer, keep=oc.last(1)))
    with pytest.raises(oc.StepRetired):
        step.check_sizes()

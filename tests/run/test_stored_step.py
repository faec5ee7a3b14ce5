"""What is read wrongly is a suspicion; what the store itself says decides. Only then is a step damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from msgspec.structs import replace

import orchestrator as oc
from orchestrator import arrays
from orchestrator.arrays import jax_internals
from orchestrator.errors import Suspect
from orchestrator.job.read_step import ReadOptions, read_step
from orchestrator.reader import Run
from orchestrator.rules import journal
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry
from orchestrator.run import stored_arrays
from orchestrator.run.checked_reads import READS
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import Entry, PosixStorage
from orchestrator.tools import verify
from tests.support.fakes import HookedStorage
from tests.support.runs import LIKE, fill, journal_of, kinds, now, state, store_of
from tests.support.snapshots import snapshot


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_arrays, "_PAUSE_S", 0.0)


@dataclass
class Lie:
    """The first `times` answers of an operation about keys that end with `name` are `answer` of the right one."""

    operation: str
    name: str
    answer: Callable[[Any], Any]
    times: int = 10**9
    told: int = field(default=0, init=False)


class Lying(HookedStorage):
    """`inner`, but for some answers."""

    def __init__(self, inner: PosixStorage, *lies: Lie) -> None:
        super().__init__(inner)
        self.lies = lies

    def _said(self, operation: str, key: str, right: Any) -> Any:
        for lie in self.lies:
            if lie.operation == operation and lie.name in key and lie.told < lie.times:
                lie.told += 1
                return lie.answer(right)
        return right

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._said("get", key, super().get(key, most_bytes))

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._said("measure", key, super().measure(key, expected_bytes))

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        for entry in super().list(prefix, start):
            yield from self._said("list", entry.key, [entry])


def flipped(body: bytes | None) -> bytes:
    assert body is not None
    return bytes([body[0] ^ 1]) + body[1:]


def gone(right: object) -> None:
    return None


def unlisted(right: object) -> list[Entry]:
    return []


RECORDS = ("manifest.json", "intent.json", "extra.json", "process/00000.bin")
ONCE = [Lie("get", f"2/e0001-a01/{name}", answer, 1) for name in RECORDS for answer in (flipped, gone)]
ALWAYS = [Lie("get", f"2/e0001-a01/{name}", answer) for name in RECORDS for answer in (flipped, gone)]
LISTED = [Lie("list", "00000002/e0001-a01/state/", unlisted)]


def named(lie: Lie) -> str:
    return f"{lie.operation} {lie.name.rpartition('/')[2]} {lie.answer.__name__}"


def lying(root: Path, lie: Lie) -> Lying:
    return Lying(PosixStorage(str(root)), Lie(lie.operation, lie.name, lie.answer, lie.times))


@pytest.mark.parametrize("lie", [*ONCE, Lie("list", "00000002/e0001-a01/state/", unlisted, 1)], ids=named)
def test_one_wrong_answer_is_asked_for_again_and_the_newest_step_restored(root: Path, lie: Lie) -> None:
    fill(root, 1, 2)
    store = lying(root, lie)
    with oc.Agent(root, options=now(), storage=store) as agent:
        restored = agent.restore(LIKE)
        assert restored is not None and restored.step == 2
    assert store.lies[0].told == 1, "it was told"
    assert "quarantined" not in kinds(root)
    reader = Run(JournalStore(lying(root, lie), "reader"))
    assert reader.restore(LIKE).step == 2


@pytest.mark.parametrize("lie", [*ALWAYS, *LISTED], ids=named)
def test_what_is_stored_right_but_always_read_wrongly_is_unavailable(root: Path, lie: Lie) -> None:
    fill(root, 1, 2)
    with (
        oc.Agent(root, options=now(), storage=lying(root, lie)) as agent,
        pytest.raises(oc.Unavailable, match="step 2"),
    ):
        agent.restore(LIKE)
    with pytest.raises(oc.Unavailable, match=r"the store's own account is"):
        Run(JournalStore(lying(root, lie), "reader")).restore(LIKE)
    journal_store = JournalStore(lying(root, lie), "verify")
    step = store_of(root).find(2)
    assert step is not None
    if lie.operation == "get":  # a listing is none of verify's business when it reads each file
        verdict = verify.read_back(journal_store, step)
        assert verdict.unread and not verdict.damaged and not verdict.good
    assert "quarantined" not in kinds(root)
    with oc.Agent(root, options=now()) as agent:
        restored = agent.restore(LIKE)
        assert restored is not None and restored.step == 2, "nothing has to be undone"


def test_a_file_of_another_save_with_the_same_crc32c_is_damaged_when_it_is_read_twice(root: Path) -> None:
    """The store's own account cannot tell them apart (an object store knows one CRC): the bytes decide."""
    fill(root, 1, 2)
    journal_store = store_of(root)
    live = journal_store.find(2)
    assert live is not None
    manifest = journal_store.step(live).manifest
    entry = next(entry for entry in manifest.files if entry.path.startswith("process/"))
    other = FileEntry(path=entry.path, bytes=entry.bytes, crc32c=entry.crc32c, crc32="00000001")

    def without_crc32(found: FileEntry) -> FileEntry:
        return FileEntry(path=found.path, bytes=found.bytes, crc32c=found.crc32c)

    store = Lying(PosixStorage(str(root)), Lie("measure", "process/", without_crc32))
    with pytest.raises(oc.Damaged, match=r"is whole, but another file: crc32 .*, the manifest says 00000001") as caught:
        JournalStore(store, "reader").step(live).checked(other)
    assert caught.value.files == ("process/00000.bin",)


class Suspicious:
    """A reader of arrays that suspects something the first `times`."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left = error, times

    def __call__(self, *arguments: Any) -> list[Any]:
        if self.left:
            self.left -= 1
            raise self.error
        return arrays.load(*arguments)


SUSPICIONS: dict[str, Exception] = {
    "a chunk": Suspect("w: chunk w/c/0: crc32c", chunks=["w/c/0"]),
    "a chunk of the tree": Suspect("count: chunk count/c: crc32c", chunks=["count/c"]),
    "a file": Suspect("w: ends at 3", files=["state/manifest.ocdbt"]),
    "anything": Suspect("w: DATA_LOSS"),
    "the store is busy": oc.Unavailable("w: HTTP 500"),
    "the store rejects": oc.StorageError("w: HTTP 403"),
}


@pytest.mark.parametrize("how", SUSPICIONS)
def test_a_suspicion_against_a_whole_step_is_read_again_and_in_the_end_unavailable(root: Path, how: str) -> None:
    fill(root, 1, 2)
    journal_store = store_of(root)
    live = journal_store.find(2)
    assert live is not None
    before = snapshot(root)
    again = ReadOptions(reader=Suspicious(SUSPICIONS[how], READS - 1))
    assert read_step(journal_store, live, LIKE, again).state["count"] == 2
    for_good = Suspicious(SUSPICIONS[how], READS)
    with pytest.raises(oc.StorageError, match=r"w: |count: "):
        read_step(journal_store, live, LIKE, ReadOptions(reader=for_good))
    assert (for_good.left, snapshot(root)) == (0, before)


def test_a_chunk_that_is_not_the_manifests_is_damage_though_its_file_is_whole(root: Path) -> None:
    fill(root, 1)
    stored = store_of(root).step(journal_of(root)[-1].live[-1])
    key, *others = stored.manifest.chunks
    stored.judge([], [key, *others])
    stored.manifest = replace(stored.manifest, chunks={**stored.manifest.chunks, key: "00000000"})
    stored.judge([], others)
    with pytest.raises(oc.Damaged, match=f"chunk {key}: crc32c .*, the manifest says 00000000") as caught:
        stored.judge([], [*others, key])
    assert caught.value.chunks == (key,)


@pytest.mark.parametrize("times", [1, 2])
def test_a_chunk_that_is_suspected_again_though_nothing_is_proven_is_not_called_good(
    times: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, 1)
    stored = store_of(root).step(journal_of(root)[-1].live[-1])
    key, answers = next(iter(stored.manifest.chunks)), [True] * times

    def check(*_: object, **__: object) -> dict[str, str]:
        return {key: f"{key}: odd"} if answers and answers.pop() else {}

    monkeypatch.setattr(arrays, "check", check)
    if times == 1:  # it was the way, once
        assert stored_arrays.bad_chunks(stored, {key: None}) == {}
    else:
        with pytest.raises(oc.Unavailable, match=f"{key}: odd; read so 2 times"):
            stored_arrays.bad_chunks(stored, {key: None})


def test_an_answer_that_was_waited_for_as_long_as_may_be_is_not_waited_for_again(root: Path) -> None:
    fill(root, 1)
    journal_store = store_of(root)
    live = journal_store.find(1)
    assert live is not None
    reader = Suspicious(oc.Unavailable("no answer within 120 s", waited=True), 2)
    with pytest.raises(oc.Unavailable, match="no answer within"):
        read_step(journal_store, live, LIKE, ReadOptions(reader=reader))
    assert reader.left == 1


class OfANewerFormat(StoredStep):
    @property
    def intent(self) -> NoReturn:  # type: ignore[override]
        raise oc.NewerFormat("format 9")


def test_a_step_of_a_newer_format_is_not_damaged(root: Path) -> None:
    fill(root, 1, 2)
    newer = store_of(root)
    newer.step = lambda live: OfANewerFormat(newer.storage, live, newer.check_live)  # type: ignore[method-assign]
    with pytest.raises(oc.NewerFormat):  # and does not step down
        Run(newer).restore(LIKE)
    assert oc.open_run(root).restore(LIKE).step == 2


# Retention.


def retire(root: Path, keep: int = 1) -> None:
    store_of(root).append(lambda head, stamp: journal.retire(head, stamp, keep=oc.last(keep)))


def test_a_reader_whom_retention_overtakes_gets_the_newest_step(root: Path) -> None:
    fill(root, 1, 2)

    def overtake(right: bytes | None) -> None:
        fill(root, 3)
        retire(root)

    store = Lying(PosixStorage(str(root)), Lie("get", "2/e0001-a01/extra.json", overtake, 1))
    assert Run(JournalStore(store, "reader")).restore(LIKE).step == 3


def test_a_step_asked_for_by_name_that_was_retired_says_so(root: Path) -> None:
    fill(root, 1, 2)
    store = Lying(PosixStorage(str(root)), Lie("get", "1/e0001-a01/extra.json", lambda right: retire(root), 1))
    with pytest.raises(oc.StepRetired, match="step 1 e0001-a01: was retired while it was read; the newest is step 2"):
        Run(JournalStore(store, "reader")).restore(LIKE, step=1)
    reader = oc.open_run(root)
    with pytest.raises(oc.StepNotFound) as caught:
        reader.restore(LIKE, step=1)
    assert not isinstance(caught.value, oc.StepRetired), "this reader has never heard of it"


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("operation", ["get", "measure", "list"])
def test_a_step_that_goes_between_any_two_looks_at_it_is_retired_and_not_damaged(
    root: Path, operation: str, name: str
) -> None:
    """Retired and deleted at the very moment of one look, of which the next tells nothing any more."""
    fill(root, 1, 2)
    attempt = next((root / "steps/00000001").iterdir())

    def gone_now(right: Any) -> Any:
        retire(root)
        shutil.rmtree(attempt)
        return [] if operation == "list" else None

    lies = [Lie(operation, f"1/e0001-a01/{name}", gone_now, 1)]
    if operation == "measure":
        lies.append(Lie("get", f"1/e0001-a01/{name}", flipped, 1))
    with pytest.raises(oc.StepRetired):
        Run(JournalStore(Lying(PosixStorage(str(root)), *lies), "reader")).restore(LIKE, step=1)


@pytest.mark.parametrize("heard", ["all_steps", "latest_step", "watch"])
def test_a_step_that_a_reader_was_told_of_is_retired_and_not_unknown(root: Path, heard: str) -> None:
    fill(root, 1)
    reader = oc.open_run(root)
    watching = reader.watch(poll_s=0.01, timeout_s=5)
    if heard == "watch":
        fill(root, 2)
        told = next(watching)
    else:
        found = getattr(reader, heard)()
        told = found if isinstance(found, int) else found[-1]
    fill(root, 7)
    retire(root)
    with pytest.raises(oc.StepRetired, match="it was retired"):
        reader.restore(LIKE, step=told)


def test_verify_says_that_a_step_was_retired_and_calls_nothing_damaged(root: Path) -> None:
    fill(root, 1, 2)
    journal_store = store_of(root)
    live = journal_store.find(1)
    assert live is not None
    retire(root)
    for path in sorted(root.glob("steps/00000001/*/state/**/d/*")):
        path.unlink()
    verdict = verify.read_back(journal_store, live)
    assert (verdict.damaged, verdict.unread, verdict.good) == ((), (), False) and "was retired" in verdict.retired
    before = snapshot(root)
    verify.record(journal_store, live, verdict)
    assert snapshot(root) == before


# What our own conversion would change.

WIDE = {"int64": 2**40 + 5, "uint64": 2**63, "float64": 1 + 2.0**-40, "complex128": 1 + 2.0**-40 + 1j}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("attest", ["off", "full"])
@pytest.mark.parametrize("cast", [False, True])
def test_64_bits_in_a_process_without_x64_are_a_mismatch_before_anything_is_read(
    root: Path, dtype: str, attest: Any, cast: bool
) -> None:
    with jax_internals.enable_x64(), oc.Agent(root, options=now(attest=attest)) as agent:
        agent.save(1, {"w": jnp.asarray(WIDE[dtype], dtype)})
    before = snapshot(root / "steps")
    with oc.Agent(root, options=now(attest=attest)) as agent:
        with pytest.raises(oc.Mismatch, match=r"w: target .*(64|128).*truncate values: enable x64"):
            agent.restore({"w": jax.ShapeDtypeStruct((), np.dtype(dtype))}, cast=cast)
        assert (agent.all_steps(), snapshot(root / "steps")) == ([1], before)
        restored = agent.restore({"w": np.zeros((), dtype)})
        assert restored is not None and restored.state["w"] == np.asarray(WIDE[dtype], dtype)
    with jax_internals.enable_x64():
        again = oc.open_run(root).restore({"w": jax.ShapeDtypeStruct((), np.dtype(dtype))})
        assert np.asarray(again.state["w"]) == np.asarray(WIDE[dtype], dtype)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_a_python_number_that_an_array_cannot_hold_is_a_mismatch(root: Path, dtype: str) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"n": 2**40, "small": -1})
    reader = oc.open_run(root)
    with pytest.raises(oc.Mismatch, match=rf"n: checkpoint int 1099511627776, target {dtype[0]}.*cannot hold it"):
        reader.restore({"n": jnp.zeros((), dtype)}, partial=True)
    small = {"small": jnp.zeros((), dtype)}
    if dtype.startswith("u"):
        with pytest.raises(oc.Mismatch, match="cannot hold it"):
            reader.restore(small, partial=True)
    else:
        assert int(reader.restore(small, partial=True).state["small"]) == -1


def test_the_state_of_a_run_is_not_confused_by_all_this(root: Path) -> None:
    fill(root, 1, 2)
    stored = store_of(root).step(journal_of(root)[-1].live[-1])
    assert stored.manifest.step == 2 and stored.intent.step == 2 and stored.extra.extra == {"at": 2}
    assert stored_arrays.bad_chunks(stored, dict.fromkeys(stored.manifest.chunks)) == {}
    stored.judge([], list(stored.manifest.chunks))
    assert jax.tree.map(np.shape, state(2))["w"] == (512,)

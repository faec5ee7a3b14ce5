"""A journal that is lost, cut short, holed or damaged is never taken for a new run: nothing is opened, collected or
overwritten, and `orchestrator recover` brings back what is whole (invariant 12)."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace as a_record

import orchestrator as oc
from orchestrator.cli.main import main
from orchestrator.job import pacing
from orchestrator.rules import evidence, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.evidence import Whole
from orchestrator.rules.journal import StoredAttempt
from orchestrator.rules.records import JournalEvent
from orchestrator.run import checked_reads
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from tests.support import builders
from tests.support.builders import head, live
from tests.support.fakes import HookedStorage
from tests.support.runs import LIKE, fill, journal_of, now, state, store_of
from tests.support.snapshots import snapshot


def key(root: Path, version: int) -> Path:
    return root / keys.journal_key(version)


@pytest.fixture
def run(root: Path) -> Path:
    """Steps 1 to 6 by two incarnations: versions 0 to 7. Step 2 is pinned (8)."""
    fill(root, 1, 2, 3)
    fill(root, 4, 5, 6)
    assert main(["orchestrator", "pin", str(root), "--step=2", "--name=paper"]) == 0
    return root


def without(root: Path, *versions: int) -> None:
    for version in versions:
        key(root, version).unlink()


def cut(root: Path, *versions: int) -> None:
    for version in versions:
        key(root, version).write_bytes(key(root, version).read_bytes()[:-30])


def marked(root: Path) -> None:
    (root / keys.index_key(7)).parent.mkdir(exist_ok=True)
    (root / keys.index_key(7)).write_bytes(b"")
    shutil.rmtree(root / "steps")
    without(root, *range(6, 9))


# How the journal was lost, and what says so.
LOST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no journal": (
        lambda root: shutil.rmtree(root / "journal"),
        "there is no journal, but attempts are, such as step 1",
    ),
    "empty journal": (lambda root: without(root, *range(9)), "there is no journal, but attempts are"),
    "no entry of the second incarnation": (lambda root: without(root, *range(4, 9)), "is of an epoch above 1"),
    "shorter by several commits": (lambda root: without(root, *range(6, 9)), "step 6 e0002-a01 builds on version 6"),
    "shorter, steps gone, a marker left": (marked, "a marker in journal-index/ names version 7"),
    "a hole": (lambda root: without(root, 5), "version 5 is missing"),
    "a wide hole": (lambda root: without(root, *range(1, 7)), "versions 1 to 6 are missing"),
    "newest cut off": (lambda root: cut(root, 8), "newest entry"),
    "newest ones cut off": (lambda root: cut(root, 6, 7, 8), "newest entry"),
    "junk at the highest key": (
        lambda root: key(root, keys.VERSION_MAX).write_bytes(b"junk"),
        f"{keys.VERSION_MAX}.json: 4 bytes",
    ),
    "junk far above": (lambda root: key(root, 10**6).write_bytes(b"junk"), "00000000000001000000.json: 4 bytes"),
}
HURTS_NO_READER = {"a hole", "a wide hole", "no entry of the second incarnation", "shorter by several commits"}
HURTS_NO_READER |= {"shorter, steps gone, a marker left"}


def lose(run: Path, how: str) -> str:
    LOST[how][0](run)
    return LOST[how][1]


@pytest.mark.parametrize("how", LOST)
def test_nothing_is_opened_collected_or_overwritten_and_the_way_out_is_named(run: Path, how: str) -> None:
    said = lose(run, how)
    before = snapshot(run)
    acts: list[Callable[[], object]] = [
        lambda: oc.Agent(run, options=now()).save(7, state(7)),
        lambda: oc.Agent(run, options=now()).restore(LIKE),
        lambda: store_of(run).append(journal.open_epoch),
        lambda: store_of(run).append(partial(journal.pin, step=4, name="x")),
        lambda: collect(store_of(run)),
        lambda: collect(store_of(run), dry_run=True),
        lambda: store_of(run).look(),
    ]
    if how not in HURTS_NO_READER:
        acts += [lambda: oc.open_run(run), lambda: oc.Agent(run), lambda: store_of(run).head()]
    for act in acts:
        with pytest.raises((oc.JournalLost, oc.Damaged)) as caught:
            act()
        text = str(caught.value)
        assert said in text
        assert f"`orchestrator doctor file://{run}`" in text and f"`orchestrator recover file://{run}`" in text
        assert caught.value.exit_code == 4 and snapshot(run) == before


@pytest.mark.parametrize("how", sorted(set(LOST) - {"junk at the highest key", "shorter, steps gone, a marker left"}))
def test_recover_lists_what_is_whole_and_on_request_the_run_goes_on_from_it(
    run: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pinned = how in ("a hole", "a wide hole", "junk far above")
    lose(run, how)
    before = snapshot(run)
    assert main(["orchestrator", "recover", str(run), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert snapshot(run) == before and told["written"] is None and (told["lost"] or told["unreadable"])
    assert main(["orchestrator", "recover", str(run), "--write"]) == 0
    assert f"orchestrator verify {run} --all" in capsys.readouterr().out
    after = journal_of(run)[-1] if "cut off" not in how and "junk" not in how else store_of(run).require_head()
    assert after.event.kind == "recovered" and after.epoch == 3 and after.version >= 2
    assert [one.step for one in after.live] == [1, 2, 3, 4, 5, 6]
    assert next(one for one in after.live if one.step == 2).pins == (("paper",) if pinned else ())
    assert oc.open_run(run).restore(LIKE).step == 6
    with oc.Agent(run, options=now(), keep=oc.last(2)) as agent:
        restored = agent.restore(LIKE)
        assert restored is not None and restored.step == 6 and agent.epoch == 4
        assert agent.save(7, state(7))
    assert oc.open_run(run).all_steps()[-2:] == [6, 7]
    # And once more: a hole below a recovered entry is no evidence.
    with oc.Agent(run, options=now()) as agent:
        assert agent.restore(LIKE) is not None
    assert main(["orchestrator", "verify", str(run), "--all"]) == 0


def test_the_history_of_a_recovered_run_is_read_past_the_hole(run: Path) -> None:
    lose(run, "shorter by several commits")
    assert main(["orchestrator", "recover", str(run), "--write"]) == 0
    for step in (7, 8):
        fill(run, step)
    # Epochs 1 and 2, of before; 3 of the recovery; 4 and 5.
    assert 2 <= pacing._history(store_of(run)).interruptions <= 4


def test_a_junk_object_at_the_highest_key_is_named_with_what_to_do(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lose(run, "junk at the highest key")
    for command in (["recover"], ["recover", "--write"], ["doctor", "--read_only"]):
        assert main(["orchestrator", command[0], str(run), *command[1:]]) == 4
        said = capsys.readouterr()
        assert f"{keys.VERSION_MAX}.json" in said.out + said.err
        if command[0] == "recover":
            assert "move it out of the run" in said.out + said.err
    key(run, keys.VERSION_MAX).unlink()
    assert oc.open_run(run).restore(LIKE).step == 6


def test_a_valid_entry_at_the_highest_key_is_no_end_without_a_recipe(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from msgspec.structs import replace

    from orchestrator.rules.codec import encode

    top = replace(journal_of(run)[-1], version=keys.VERSION_MAX)
    key(run, keys.VERSION_MAX).write_bytes(encode(top))
    for command in (["recover"], ["recover", "--write"]):
        capsys.readouterr()
        assert main(["orchestrator", command[0], str(run), *command[1:]]) == 4
        said = capsys.readouterr()
        assert "no version comes after" in said.out + said.err and "move it out of the run" in said.out + said.err
    with pytest.raises(oc.Damaged, match="no version comes after it; no job has written it: move it out of the run"):
        store_of(run).put(replace(top, version=top.version + 1))


def test_recover_never_brings_back_what_the_journal_retired_or_quarantined(root: Path) -> None:
    fill(root, 1, 2, 3)
    fill(root, 4)
    copies = root.parent / "copies"
    shutil.copytree(root / "steps", copies)
    for step in (2, 4):
        assert main(["orchestrator", "quarantine", str(root), f"--step={step}", "--reason=x", "--force"]) == 0
    assert main(["orchestrator", "gc", str(root), "--keep_last=1"]) == 0  # retires and deletes 1
    fill(root, 5, 6)
    shutil.copytree(copies, root / "steps", dirs_exist_ok=True)  # a restored backup of the data: step 1 is back
    head_now = journal_of(root)[-1]
    without(root, head_now.version)
    assert main(["orchestrator", "recover", str(root), "--write"]) == 0
    after = store_of(root).require_head()
    assert {one.step: one.restorable for one in after.live} == {2: False, 3: True, 4: False, 5: True, 6: True}


def test_recover_takes_a_whole_attempt_that_a_crash_kept_from_its_commit(root: Path) -> None:
    fill(root, 1, 2)
    without(root, 2)  # the commit of step 2: as if killed before it
    assert store_of(root).look()[0] is not None  # no evidence of a loss
    assert main(["orchestrator", "recover", str(root), "--write"]) == 0
    assert oc.open_run(root).restore(LIKE).step == 2


def test_recover_says_what_is_missing_of_an_attempt_and_leaves_it_out(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "journal")
    (manifest,) = run.glob("steps/00000003/*/manifest.json")
    manifest.unlink()
    data = max(run.glob("steps/00000004/*/state/*/d/*"), key=lambda path: path.stat().st_size)
    data.unlink()
    (receipt,) = run.glob("steps/00000005/*/receipts/00000.json")
    receipt.write_bytes(receipt.read_bytes()[:-3] + b"00\n")
    capsys.readouterr()
    assert main(["orchestrator", "recover", str(run), "--json"]) == 4
    told = {one["step"]: one for one in json.loads(capsys.readouterr().out)["attempts"]}
    assert "no manifest" in told[3]["problem"] and data.name in told[4]["problem"]
    assert "receipts/00000.json" in told[5]["problem"]
    assert [step for step, one in told.items() if one["outcome"] == "added"] == [1, 2, 6]
    assert main(["orchestrator", "recover", str(run), "--write"]) == 0
    assert oc.open_run(run).all_steps() == [1, 2, 6]


def test_recover_has_nothing_to_do_with_a_healthy_run_or_no_run(run: Path, tmp_path: Path) -> None:
    before = snapshot(run)
    assert main(["orchestrator", "recover", str(run)]) == 0
    assert main(["orchestrator", "recover", str(run), "--write"]) == 2
    assert snapshot(run) == before
    assert main(["orchestrator", "recover", str(tmp_path / "nothing")]) == 3


@pytest.mark.parametrize("versions", [(2,), (1, 2), (0, 1, 2)])
def test_a_job_whose_journal_is_cut_under_it_writes_over_nothing_and_stops(
    root: Path, versions: tuple[int, ...]
) -> None:
    agent = oc.Agent(root, options=now())
    for step in (1, 2):
        agent.save(step, state(step))
    without(root, *versions)
    left = sorted(path.name for path in (root / "journal").iterdir())
    with pytest.raises(oc.JournalLost, match=r"entry 2 was there and is gone"):
        agent.save(3, state(3))
    with pytest.raises(oc.JournalLost):  # for good, as fenced
        agent.save(4, state(4))
    assert sorted(path.name for path in (root / "journal").iterdir()) == left


def test_two_lost_journals_in_a_row_lose_no_step(run: Path) -> None:
    """The case that began it: the second start deleted every committed step as an orphan."""
    shutil.rmtree(run / "journal")
    data = snapshot(run / "steps")
    for _ in range(3):
        with pytest.raises(oc.JournalLost), oc.Agent(run, save=oc.every(10), keep=oc.last(5)) as agent:
            agent.restore(LIKE)
    assert snapshot(run / "steps") == data


# What proves it, as rules.


@pytest.mark.parametrize(
    ("version", "epoch", "found", "marker", "proves"),
    [
        (7, 2, {}, -1, False),
        (7, 2, {(1, "e0001-a01"): StoredAttempt(True, 3)}, 0, False),
        (7, 2, {(1, "e0002-a01"): StoredAttempt(True, 7)}, 7, False),
        (7, 2, {(1, "e0002-a01"): StoredAttempt(False, 7)}, -1, False),
        (7, 2, {(1, "e0001-a01"): StoredAttempt(True, -1)}, -1, False),  # written before there was the field
        (7, 2, {(1, "e0003-a01"): StoredAttempt()}, -1, True),
        (7, 2, {(1, "e0001-a01"): StoredAttempt(False, 8)}, -1, True),
        (7, 2, {}, 8, True),
        (7, 2, {(5, "e0001-a01"): StoredAttempt(True, 9)}, -1, False),  # live: the journal knows it
        (-1, 0, {}, -1, False),
        (-1, 0, {(1, "e0001-a01"): StoredAttempt()}, -1, True),
        (-1, 0, {}, 0, True),
    ],
)
def test_what_proves_that_entries_are_missing(
    version: int, epoch: int, found: dict[tuple[int, str], StoredAttempt], marker: int, proves: bool
) -> None:
    now_ = head(live(5), version=version, epoch=epoch) if version >= 0 else None
    attempts = {AttemptId(*name): one for name, one in found.items()}
    assert bool(evidence.lost(now_, attempts, marker)) == proves


@pytest.mark.parametrize(
    ("versions", "holes"),
    [([], []), ([3], []), ([0, 1, 2], []), ([0, 2, 7], [(1, 1), (3, 6)]), ([5, 10**20], [(6, 10**20 - 1)])],
)
def test_holes(versions: list[int], holes: list[tuple[int, int]]) -> None:
    assert evidence.holes(versions) == holes


def test_what_is_chosen_of_the_whole_attempts() -> None:
    surviving = head(
        live(10, pins=("p",)), live(20, "e0002-a01", trust="quarantined"), live(30, "e0002-a01"), epoch=2, version=7
    )
    whole = [
        Whole(live(10)),  # known
        Whole(live(5, "e0001-a09")),  # never committed, and the journal has newer steps
        Whole(live(40, "e0003-a01"), 9),
        Whole(live(40, "e0003-a02"), 11),
        Whole(live(20, "e0003-a01"), 10),  # saved again after the tail
        Whole(live(50, "e0003-a01"), 8),
    ]
    choice = evidence.choose(surviving, whole, {(50, "e0003-a01")})
    assert [one.id for one in choice.live] == [
        (10, "e0001-a01"),
        (30, "e0002-a01"),
        (20, "e0003-a01"),
        (40, "e0003-a02"),
    ]
    assert {one.id for one, _ in choice.left_out} == {
        (5, "e0001-a09"),
        (40, "e0003-a01"),
        (50, "e0003-a01"),
    }
    following = evidence.recovered(
        surviving, journal.Stamp("me", 1.0, "id"), version=12, epoch=4, live=choice.live, reason="r"
    )
    assert [one.id for one in following.aside] == [(20, "e0002-a01")]
    assert following.event == JournalEvent(kind="recovered", reason="r", steps=(10, 30, 20, 40))
    assert following.live[0].pins == ("p",)


def test_the_version_of_a_recovered_entry_is_above_all_that_was_named_and_leaves_a_hole() -> None:
    assert evidence.above(None, [], [-1]) == 1
    assert evidence.above(head(version=7), [0, 7], [3, -1]) == 9
    assert evidence.above(head(version=7), [0, 7, 8], [30, 12]) == 32


def test_intent_receipts_and_manifest_name_the_version_that_this_job_made_durable(root: Path) -> None:
    from orchestrator.rules.records import Intent, Manifest, Receipt

    with oc.Agent(root, options=now()) as agent:
        for step in (1, 2):
            agent.save(step, state(step))
            for thread in threading.enumerate():
                if thread.name == "collect":  # it makes the head durable before it deletes: here, still our own entry
                    thread.join(30)
            assert main(["orchestrator", "pin", str(root), f"--step={step}"]) == 0  # another's entry: not named
    store = store_of(root)
    for step, version in ((1, 0), (2, 1)):
        for name, kind in (
            (keys.INTENT, Intent),
            (keys.MANIFEST, Manifest),
            (keys.receipt_name(0), Receipt),
        ):
            record: Any = checked_reads.record(store.storage, AttemptId(step, "e0001-a01").key(name), kind)
            assert record.built_on == version, (step, name)


def test_an_attempt_that_was_finished_after_the_listing_is_not_collected_as_unfinished(root: Path) -> None:
    """What the model found: the listing comes before the head, and a manifest may come between the two."""
    fill(root, 1)
    orphan = root / AttemptId(9, "e0001-a01").prefix
    (orphan / "state").mkdir(parents=True)
    (orphan / "state" / "x").write_bytes(b"data")
    with oc.Agent(root, options=now()) as agent:
        agent.restore(LIKE)  # epoch 2: the attempt can never commit

    def finish(operation: str, key: str) -> None:
        if operation == "get" and key.startswith("journal/"):
            (orphan / "manifest.json").write_bytes(b"{}")

    storage = HookedStorage(PosixStorage(str(root)), before=finish)
    assert collect(JournalStore(storage, "gc")).files == 0 and (orphan / "state" / "x").exists()
    (orphan / "manifest.json").unlink()
    assert collect(store_of(root)).files == 1 and not orphan.exists()


def test_a_job_that_saves_while_somebody_looks_is_no_proof_of_a_loss(root: Path) -> None:
    """The intent is written after the head was read, and builds on an entry that came in between."""
    fill(root, 1)
    attempt = root / AttemptId(2, "e0001-a01").prefix
    (attempt / "state").mkdir(parents=True)
    (attempt / "state" / "x").write_bytes(b"data")
    from orchestrator.rules.codec import encode

    def save_on(operation: str, key: str) -> None:
        if (operation, key) == ("get", f"{AttemptId(2, 'e0001-a01').prefix}{keys.INTENT}"):
            head_now = store_of(root).append(partial(journal.pin, step=1, name="x"))
            assert head_now is not None
            intent = a_record(builders.intent(step=2), built_on=head_now.version)
            (attempt / "intent.json").write_bytes(encode(intent))

    storage = HookedStorage(PosixStorage(str(root)), before=save_on)
    found = JournalStore(storage, "looker").look()
    assert found[0] is not None and found[1][2, "e0001-a01"].built_on == 2

"""A tier on this machine: whose directory it is, what is in it, and how much room it has."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator.errors import Fenced, NewerFormat, StorageError, UsageError
from orchestrator.policy import last
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.run import tier_directory
from orchestrator.run.held_steps import on_this_host
from orchestrator.run.tier import Beside, OwnTier
from orchestrator.run.tier_keeping import Keeper
from tests.support import builders
from tests.support.images import signed
from tests.support.runs import fill, store_of
from tests.support.snapshots import snapshot

RUN = "0123456789abcdef"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(tier_directory.of_process(str(tmp_path), RUN, 0))


def own_tier(path: Path, epoch: int = 1) -> OwnTier:
    tier = OwnTier(str(path), "test")
    tier.open_epoch(epoch, 0)
    return tier


def hold(tier: OwnTier, step: int, size: int = 1000, epoch: int = 1) -> AttemptId:
    """As far as the log and the room go."""
    attempt = AttemptId.of(step, epoch, 1)
    tier.storage.create(attempt.key("state/data"), b"x" * size)
    entry = builders.live(step, attempt.name)
    tier.log.append(partial(journal.commit, epoch=epoch, entry=entry, keep=last(9)))
    return attempt


def keeper(tier: OwnTier, epoch: int = 1, *, listed: tuple[AttemptId, ...] = (), decides: bool = False) -> Keeper:
    return Keeper(tier, Beside(tier.path, {0}), epoch, listed, decides=decides)


def make_room(keeping: Keeper, need: int, limit: int) -> None:
    attempt = AttemptId.of(999, 1, 1)
    keeping.room.record(limit)
    keeping.make_room(attempt, need, 0)
    keeping.settled(attempt)


def steps(tier: OwnTier) -> list[int]:
    head = tier.log.head()
    return [live.step for live in head.live] if head else []


# Whose it is.


def test_a_tier_is_made_for_its_user_alone_below_a_directory_that_is_there(path: Path, tmp_path: Path) -> None:
    own_tier(path)
    for each in (path, path.parent, path.parent.parent):
        assert each.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent.parent == tmp_path.resolve()
    with pytest.raises(StorageError, match="not-there"):
        own_tier(Path(tier_directory.of_process(str(tmp_path / "not-there"), RUN, 0)))


def link(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.parents[1].mkdir(mode=0o700)
    path.parent.mkdir(mode=0o700)
    path.symlink_to(elsewhere)


def link_above(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.parents[1].symlink_to(elsewhere)


def open_to_all(path: Path) -> None:
    path.parents[1].mkdir()
    path.parents[1].chmod(0o755)


def somebody_elses(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a directory away")
    path.parents[1].mkdir(mode=0o700)
    os.chown(path.parents[1], 4242, -1)


def a_file(path: Path) -> None:
    path.parents[1].write_text("")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (link, "is a symbolic link"),
        (link_above, "is a symbolic link"),
        (open_to_all, "may be entered by others"),
        (somebody_elses, "belongs to user 4242"),
        (a_file, "is no directory"),
    ],
)
def test_a_directory_that_is_not_ours_alone_is_neither_written_nor_read(spoil: object, said: str, path: Path) -> None:
    assert callable(spoil)
    spoil(path)
    with pytest.raises(StorageError, match=said):
        own_tier(path)
    found = on_this_host(str(path), [str(path)])
    assert not found.listed and (not os.path.lexists(path) or said in found.unreadable[0])
    assert not (path.parents[2] / "elsewhere" / "journal").exists()


def test_a_path_of_another_process_that_is_no_tiers_is_not_read(tmp_path: Path) -> None:
    fill(tmp_path / "run", 1)
    assert (
        on_this_host(str(tmp_path), [str(tmp_path / "run")])
        .unreadable[0]
        .endswith("is no directory of a tier; not used")
    )


def test_each_run_has_a_directory_of_its_own_also_at_the_same_root(root: Path) -> None:
    assert tier_directory.identity(store_of(root)) is None
    fill(root, 1)
    first = tier_directory.identity(store_of(root))
    fill(root, 2)
    assert tier_directory.identity(store_of(root)) == first != None  # noqa: E711
    root.rename(root.with_name("old"))
    fill(root, 1)
    assert tier_directory.identity(store_of(root)) not in (None, first)


def test_the_environment_says_where_tiers_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ORCHESTRATOR_TIER_DIR")
    assert tier_directory.of_run(None, RUN) == f"/dev/shm/orchestrator-{os.getuid()}/{RUN}"
    monkeypatch.setenv("ORCHESTRATOR_TIER_DIR", str(tmp_path))
    assert Path(tier_directory.of_run(None, RUN)).parents[1] == tmp_path.resolve()
    monkeypatch.setenv("ORCHESTRATOR_TIER_DIR", "tier")
    with pytest.raises(UsageError, match="ORCHESTRATOR_TIER_DIR='tier'"):
        tier_directory.of_run(None, RUN)
    with pytest.raises(UsageError, match="ORCHESTRATOR_TIER_DIR='tier'"):
        oc.Agent(tmp_path / "run", tiers=[oc.memory()])


# What is in it.


def test_a_newer_incarnation_fences_an_older_one_in_the_tier_as_well(path: Path) -> None:
    old = own_tier(path, 3)
    hold(old, 20, 100_000, epoch=3)
    new = own_tier(path, 4)
    assert steps(new) == [20]
    with pytest.raises(Fenced, match="fenced by epoch 4"):
        hold(old, 40, epoch=3)
    with pytest.raises(Fenced):
        own_tier(path, 3)
    hold(new, 60, 100_000, epoch=4)
    with pytest.raises(Fenced):  # nor does it make room at the cost of the newer one
        make_room(keeper(old, 3), 50_000, 230_000)
    new.release([AttemptId.of(60, 4, 1)], "done")
    assert steps(new) == [20]


def test_the_log_stays_small_and_is_still_one(path: Path) -> None:
    tier = own_tier(path)
    for step in range(40):
        hold(tier, step, size=1)
        tier.forget_older_entries()
    assert len(list(tier.storage.list(keys.JOURNAL))) == 16
    assert steps(own_tier(path, 2)) == list(range(31, 40))


def test_a_log_goes_on_from_its_newest_whole_entry(path: Path) -> None:
    tier = own_tier(path)
    for step in (20, 40, 60):
        hold(tier, step)
    for entry in sorted((path / "journal").iterdir())[-2:]:
        entry.write_bytes(entry.read_bytes()[:-9])
    assert {offer.step for offer in on_this_host(str(path), [str(path)]).listed} == {20}
    gone_on = own_tier(path, 2)
    assert steps(gone_on) == [20]
    hold(gone_on, 80, epoch=2)
    assert steps(own_tier(path, 3)) == [20, 80]


def test_a_log_that_cannot_be_trusted_is_begun_again_and_what_others_may_list_stays(path: Path) -> None:
    tier = own_tier(path)
    hold(tier, 20)
    for entry in (path / "journal").iterdir():
        entry.write_bytes(entry.read_bytes()[:-9])
    assert not on_this_host(str(path), [str(path)]).listed
    begun_again = own_tier(path, 2)
    assert steps(begun_again) == [] and list(begun_again.attempts()) == [AttemptId.of(20, 1, 1)]
    hold(begun_again, 40, epoch=2)
    keeper(begun_again, 2).free()
    assert [attempt.step for attempt in begun_again.attempts()] == [40]


def test_a_log_is_begun_beside_the_copies_that_were_there_before_it(path: Path) -> None:
    """A process runs where an earlier start had another's copies: they may be the only ones of that part."""
    first = AttemptId.of(20, 1, 1)
    tier_directory.make(str(path))
    OwnTier(str(path), "copy").storage.create(first.key("receipts/00000.json"), b"{}")
    tier = own_tier(path, 2)
    keeper(tier, 2, listed=(first,)).free()
    assert list(tier.attempts()) == [first] and not on_this_host(str(path), [str(path)]).unreadable


def test_a_log_of_a_newer_version_is_left_as_it_is_and_nothing_is_held(path: Path) -> None:
    hold(own_tier(path), 20)
    newest = max((path / "journal").iterdir())
    newest.write_bytes(signed({**json.loads(newest.read_bytes()), "format": 2}))
    before = snapshot(path)
    with pytest.raises(NewerFormat, match="format 2, this version reads up to 1"):
        own_tier(path, 2)
    assert snapshot(path) == before


def test_another_processs_log_follows_process_0s_as_far_as_it_has_a_part(path: Path) -> None:
    first, second = own_tier(path), own_tier(path.with_name("process-00001"))
    for step in (20, 40, 60):
        attempt = hold(first, step)
        if step > 20:
            second.storage.create(attempt.key("receipts/00001.json"), b"{}")
    second.follow(first.log)
    assert steps(second) == [40, 60]
    first.release([AttemptId.of(40, 1, 1)], "room")
    second.follow(first.log)
    assert steps(second) == [60] and not list(first.storage.list("steps/00000040"))


def beside(path: Path, process: int, *attempts: AttemptId) -> OwnTier:
    """The directory of a process that is on another host, with copies of these."""
    other = OwnTier(str(path.with_name(f"process-{process:05d}")), "copy")
    tier_directory.make(other.path)
    for attempt in attempts:
        other.storage.create(attempt.key("state/data"), b"x" * 1000)
    return other


def test_copies_of_what_is_held_no_more_are_freed_and_those_of_the_next_step_are_not(path: Path) -> None:
    tier = own_tier(path)
    held = [hold(tier, step) for step in (20, 40, 60)]
    ahead, aborted = AttemptId.of(80, 1, 1), AttemptId.of(50, 1, 1)
    copies = beside(path, 1, *held, aborted, ahead)
    keeping = keeper(tier)
    keeping.free()
    assert set(copies.attempts()) == {*held, aborted, ahead}  # nothing has ended here yet, as far as it knows
    keeping.decided(aborted, tier.log.require_head())
    keeping.free()
    assert aborted in copies.attempts()  # process 0 has not said so: it may commit it yet
    keeping.decided(held[-1], tier.log.require_head())  # one at a time
    keeping.free()
    assert set(copies.attempts()) == {*held, ahead}
    keeping.release(held[:1], "retention")
    assert set(copies.attempts()) == {*held[1:], ahead} and set(tier.attempts()) == set(held[1:])
    deciding = keeper(tier, decides=True)
    deciding.decided(ahead, tier.log.require_head())
    deciding.free()
    assert set(copies.attempts()) == set(held[1:])


def test_a_step_that_is_entered_while_another_thread_looks_for_what_is_over_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = own_tier(path)
    keeping, live, entered = keeper(tier, decides=True), tier.live, list[AttemptId]()

    def meanwhile() -> object:
        before = live()
        if not entered:
            entered.append(hold(tier, 2))
            head = tier.log.head()
            assert head
            keeping.decided(entered[0], head)
        return before

    monkeypatch.setattr(tier, "live", meanwhile)
    keeping.unpin(AttemptId.of(1, 1, 1))  # an upload has ended
    assert entered and entered[0] in tier.attempts()
    keeping.free()
    assert entered[0] in tier.attempts()


def test_what_processes_held_that_the_job_has_no_more_of_is_freed_once_it_is_superseded(path: Path) -> None:
    for process in range(3):
        hold(own_tier(path.with_name(f"process-{process:05d}")), 20)
    kept = AttemptId.of(20, 1, 1)
    tier = own_tier(path, 2)
    keeping = keeper(tier, 2, listed=(kept,))
    keeping.free()
    assert len(list(path.parent.glob("*/steps/00000020"))) == 3
    newer = hold(tier, 40, epoch=2)
    tier.release([kept], "retention")
    keeping.decided(newer, tier.log.require_head())
    keeping.free()
    assert list(path.parent.glob("*/steps/00000020")) == []


# Room.


def test_older_steps_go_for_a_new_one_and_the_newest_stays(path: Path) -> None:
    tier = own_tier(path)
    for step in (20, 40, 60):
        hold(tier, step, 100_000)
    make_room(keeper(tier), 100_000, 450_000)
    assert steps(tier) == [20, 40, 60]
    make_room(keeper(tier), 200_000, 450_000)
    assert steps(tier) == [40, 60] and not list(tier.storage.list("steps/00000020"))
    with pytest.raises(StorageError, match=r"needs 400000 bytes .* there are \d+ of the 450000 of bytes_max beside"):
        make_room(keeper(tier), 400_000, 450_000)
    assert steps(tier) == [40, 60]


@pytest.mark.parametrize("first", [0, 1])
def test_processes_of_a_host_free_older_steps_for_one_another(path: Path, first: int) -> None:
    """Whichever comes first: each frees its own parts alone, and would else wait for the other for good."""
    tiers = [own_tier(path.with_name(f"process-{process:05d}")) for process in (0, 1)]
    keeping = [
        Keeper(tier, Beside(tier.path, {0, 1}) if process == 0 else None, 1, (), processes=2)
        for process, tier in enumerate(tiers)
    ]
    for step in (20, 40):
        for tier in tiers:
            hold(tier, step, 100_000)
    copies = path.with_name("process-00007")
    for step in (20, 40):
        file = copies / AttemptId.of(step, 1, 1).key("state/data")
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x" * 200_000)
    copies.chmod(0o700)
    keeping[0].room.record(1_050_000)  # 800,000 are there, and 400,000 come
    for process in (first, 1 - first):
        keeping[process].make_room(AttemptId.of(60, 1, 1), 100_000, 100_000)
    assert [steps(tier) for tier in tiers] == ([[40], [40]] if first else [[40], [20, 40]])
    for each in keeping:
        each.settled(AttemptId.of(60, 1, 1))


def test_more_than_the_machine_can_spare_is_refused_with_both_numbers(path: Path) -> None:
    tier = own_tier(path)
    free = tier_directory.free_bytes(str(path))
    with pytest.raises(
        StorageError,
        match=rf"needs {1 << 59} bytes for a held step, and {1 << 59} for the copies .* there are \d+ beside the \d+ ",
    ):
        keeper(tier).make_room(AttemptId.of(20, 1, 1), 1 << 59, 1 << 59)
    assert 0 < free < 1 << 50


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs")
def test_a_tmpfs_has_no_more_room_than_the_machine_has_memory() -> None:
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    assert tier_directory.free_bytes("/dev/shm") <= available + (1 << 30)


def test_a_reader_of_no_tier_finds_nothing(tmp_path: Path) -> None:
    found = on_this_host(str(tmp_path / "nowhere"), [])
    assert found.offers() == [] and found.unreadable == []
    assert found.listed == {} and found.parts == {}

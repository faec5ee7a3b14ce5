"""Holding on several hosts, each with a tier server, as far as the stores go: what is written here is there as well;
and what comes of it where a host does not answer, has no room, or holds for a newer start."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.errors import StorageError
from orchestrator.job import tier_opening
from orchestrator.job.tier_hosts import TierHosts
from orchestrator.job.tier_opening import OpenTiers, open_tiers
from orchestrator.job.tier_rounds import Place
from orchestrator.policy import last
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode
from orchestrator.rules.placement import Placement
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run.tier import OwnTier
from tests.support import builders
from tests.support.runs import fill, store_of
from tests.support.threaded_job import Member, ThreadedJob

FIRST = AttemptId.of(20, 1, 1)
BIG = b"x" * 100_000


@contextmanager
def hosts(
    root: Path,
    count: int,
    epoch: int = 1,
    prepare: Callable[[int, Path], None] = lambda process, directory: directory.mkdir(exist_ok=True),
    **tier: Any,
) -> Iterator[list[OpenTiers | None]]:
    """A job of `count` processes, each on a host of its own: its tier is a directory beside the run's root."""
    if not root.exists():
        fill(root, 1)

    def start(me: Member) -> tuple[Member, OpenTiers | None]:
        directory = root.parent / f"tier-{me.process}"
        prepare(me.process, directory)
        return me, open_tiers(oc.memory(directory=directory, **tier), store_of(root), me, epoch, 30.0)

    found = ThreadedJob(count).each(start)
    with ExitStack() as stack:
        for member, _ in found:
            stack.callback(tier_opening.tier_hosts.left, member)
        yield [tiers for _, tiers in found]


def opened(found: list[OpenTiers | None]) -> list[OpenTiers]:
    assert all(found)
    return [tiers for tiers in found if tiers]


def files(root: Path, host: int) -> set[str]:
    """Of attempts, with the part that they are of."""
    (run,) = (root.parent / f"tier-{host}").glob("orchestrator-*/*")
    return {str(path.relative_to(run)) for path in run.glob("process-*/steps/*/*/**/*") if path.is_file()}


def test_what_one_writes_is_on_its_host_and_on_those_that_take_its_copies_and_nowhere_else(root: Path) -> None:
    with hosts(root, 3) as found:
        tiers = opened(found)
        for process, each in enumerate(tiers):
            name = FIRST.receipt_key(process)
            each.storage.create(name, BIG)
            own = Path(each.own.path) / FIRST.key("state/big")
            own.parent.mkdir(parents=True)
            own.write_bytes(BIG)
            each.storage.make_durable([FIRST.key("state/big"), name])
            expected = {f"process-{process:05d}/{key}" for key in (name, FIRST.key("state/big"))}
            (target,) = each.hosts.targets(process)
            for host in range(3):
                assert (expected <= files(root, host)) == (host in (process, target)), (process, host)
                assert host in (process, target) or not expected & files(root, host)
            assert each.storage.sent_bytes(FIRST) == 2 * len(BIG)  # the receipt once, though it was made durable again
        assert tiers[0].of_all.storage.get(FIRST.receipt_key(2)) == BIG  # process 0 reads what all have written
        placed = decode(Path(tiers[1].own.path, keys.PLACEMENT).read_bytes(), Placement, "here")
        assert placed.survives == tiers[0].hosts.survives == "any one host" and placed.epoch == 1
        assert "all hosts are in one node" in placed.notes[0]
        for path in root.parent.glob("tier-*/orchestrator-*/*/process-*/journal/*"):
            assert path.parents[1].name == f"process-{int(path.parents[4].name[-1]):05d}"  # a copy has no log


def test_a_host_that_does_not_answer_is_named_and_when_it_is_back_all_is_well_again(root: Path) -> None:
    with hosts(root, 2) as found:
        here, there = opened(found)
        server = there.hosts.reach.server
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        server.close()
        with pytest.raises(StorageError, match="no copy on host-1: host-1: "):
            here.storage.create(FIRST.receipt_key(0), b"{}")
        there.hosts.look_after_server()
        second = AttemptId.of(40, 1, 1)
        here.storage.create(second.receipt_key(0), b"{}")
        assert f"process-00000/{second.receipt_key(0)}" in files(root, 1)


def test_a_host_without_a_tier_server_is_named() -> None:
    places = tuple(Place("/a", machine) for machine in ("m0", "m1"))
    apart = TierHosts(oc.memory(), "0" * 16, 0, places, ("host-a", "host-b"))
    with pytest.raises(StorageError, match="host-b has no tier server"):
        tier_opening._part(apart, 1, "/a/run/process-00001")


def test_a_host_that_has_stopped_is_given_up_in_bounded_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_opening.tier_hosts, "_PEER_S", 1.0)
    with hosts(root, 2) as found:
        here, there = opened(found)
        server = there.hosts.reach.server
        assert server is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            failed: list[BaseException] = []

            def write() -> None:
                try:
                    here.storage.create(FIRST.receipt_key(0), BIG)
                except StorageError as error:
                    failed.append(error)

            thread = threading.Thread(target=write)
            thread.start()
            thread.join(60)
            assert not thread.is_alive() and "no copy on host-1" in str(failed[0])
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_copies_take_no_more_of_the_network_than_they_may(root: Path) -> None:
    with hosts(root, 2, copy_bytes_per_s=1_000_000) as found:
        here, _ = opened(found)
        began = time.monotonic()
        here.storage.create(FIRST.receipt_key(0), 15 * BIG)
        assert time.monotonic() - began > 1.2  # 1.5 s, less what may be sent at once


def test_an_older_start_is_fenced_at_the_hosts_that_take_its_copies(root: Path) -> None:
    with hosts(root, 2) as found:
        here, there = opened(found)
        OwnTier(there.own.path, "newer").open_epoch(2, 1)
        with pytest.raises(StorageError, match="fenced by epoch 2"):
            here.storage.create(FIRST.receipt_key(0), b"{}")


def test_where_there_is_no_room_for_a_copy_both_numbers_are_named(root: Path) -> None:
    with hosts(root, 2, bytes_max=50_000) as found:
        here, _ = opened(found)
        with pytest.raises(
            StorageError, match=r"no copy on host-1: .*needs 100000 bytes, and there are \d+ of the 50000"
        ):
            here.storage.create(FIRST.receipt_key(0), BIG)
        assert not files(root, 1)


def test_a_new_process_0_without_a_log_takes_nothing_from_those_who_have_one(root: Path) -> None:
    """Its host was lost: what survivors list, and the copy of its own part, stay until a newer step is held."""
    with hosts(root, 3) as found:
        tiers = opened(found)
        for process, each in enumerate(tiers):
            each.storage.create(FIRST.receipt_key(process), BIG)
        tiers[0].of_all.append(held_entry(FIRST))
        for each in tiers[1:]:
            each.own.follow(tiers[0].of_all)
        (keeper_of_0,) = tiers[0].hosts.targets(0)
    (root.parent / "tier-0").rename(root.parent / "lost")
    with hosts(root, 3, epoch=2) as found:
        tiers = opened(found)
        for each in tiers:
            if each.hosts.me:
                each.own.follow(each.of_all)
            each.keeper.free()
            each.keeper.free(for_room=True)
        assert tiers[0].own.live() == ()
        assert [[one.step for one in each.own.live()] for each in tiers[1:]] == [[20], [20]]
        assert f"process-00000/{FIRST.receipt_key(0)}" in files(root, keeper_of_0)


def held_entry(attempt: AttemptId) -> Any:
    return partial(journal.commit, epoch=attempt.epoch, entry=builders.live(attempt.step, attempt.name), keep=last(2))


def no_directory(process: int, directory: Path) -> None:
    if process != 1:
        directory.mkdir(exist_ok=True)


def a_file(process: int, directory: Path) -> None:
    directory.write_text("") if process == 1 else directory.mkdir(exist_ok=True)


def anybodys(process: int, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    base = directory / f"orchestrator-{os.getuid()}"
    base.mkdir(exist_ok=True)
    base.chmod(0o755 if process == 1 else 0o700)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (no_directory, "process 1 (host-1): {place}: there is no such directory"),
        (a_file, "process 1 (host-1): {place}"),
        (anybodys, "may be entered by others"),
    ],
)
def test_a_tier_that_cannot_be_used_is_named_and_nothing_is_held_anywhere(
    prepare: Callable[[int, Path], None], said: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), hosts(root, 3, prepare=prepare) as found:
        assert found == [None, None, None]
    assert "no steps are held in memory, saves to the store go on: " in caplog.text
    assert said.format(place=root.parent / "tier-1") in caplog.text


@pytest.mark.parametrize(
    ("count", "tier", "environ", "said", "survives"),
    [
        (2, {"copies": 3}, "node=n{}", "2 hosts: 1 of the 3 copies that were asked for", "any one node"),
        (2, {"domain": "rack"}, "rack=r,node=n{}", "all hosts are in one rack, r: copies go to", "any one node"),
        (2, {"domain": "slice"}, "node=n{}", "the slice of host-0, host-1 is not known: copies go to", "any one node"),
        (2, {"domain": "rack"}, "r{}", "", "any one rack"),
        (2, {"copies": 0}, "", "", "no host"),
        (1, {}, "", "", "no host"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_named_once_and_the_rest_is_promised(
    count: int,
    tier: dict[str, Any],
    environ: str,
    said: str,
    survives: str,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tier_opening.tier_hosts.place

    def elsewhere(asked: MemoryTier, given: Any) -> Any:
        assert asked.directory is not None
        number = asked.directory[-1]
        with pytest.MonkeyPatch.context() as local, lock:
            local.setenv("ORCHESTRATOR_DOMAIN", environ.format(number))
            return place(asked, given)

    lock = threading.Lock()
    monkeypatch.setattr(tier_opening.tier_hosts, "place", elsewhere)
    with caplog.at_level(logging.WARNING), hosts(root, count, **tier) as found:
        tiers = opened(found)
        assert tiers[0].hosts.survives == survives
        tiers[0].storage.create(FIRST.receipt_key(0), b"{}")  # it holds all the same
    warned = [record.getMessage() for record in caplog.records if "held steps: " in record.getMessage()]
    assert len(warned) == bool(said) and all(said in one for one in warned)

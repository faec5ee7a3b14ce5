"""Coming back from the memory of several hosts: each file from wherever it is, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orchestrator as oc
from orchestrator.job import tier_hosts
from orchestrator.observe import events
from tests.support.runs import state
from tests.support.tiers import SomeHosts, Together, crashed_at_14

Seen = list[Any]


@pytest.fixture
def seen() -> Iterator[Seen]:
    found: Seen = []
    kinds = (events.HeldStepDropped, events.CopyDropped)
    stop = events.subscribe(lambda event: found.append(event) if isinstance(event, kinds) else None)
    yield found
    stop()


@pytest.fixture
def three(root: Path, tmp_path: Path) -> SomeHosts:
    return SomeHosts(crashed_at_14(root), tmp_path / "hosts", 3)


def of(step: int) -> str:
    return f"steps/{step:08d}/"


def is_data(name: str) -> bool:
    return "/state/ocdbt.process_" in name


def is_record(name: str) -> bool:
    return name.startswith("steps/") and not is_data(name)


def is_log(name: str) -> bool:
    return name.startswith("journal")


def check(restored: list[Any], step: int) -> None:
    for one in restored:
        assert one is not None and one.step == step
        assert np.array_equal(one.state["w"], state(step)["w"]) and one.state["count"] == step
        assert one.process_states == {0: f"at {step}".encode()} and one.extra["at"] == step


def test_parts_on_three_hosts_make_one_step_and_every_process_says_where_its_bytes_came_from(
    three: SomeHosts, seen: Seen
) -> None:
    three.place(0, 0, is_log)
    three.place(0, 0, is_record)
    three.place(1, 1, is_data)
    three.place(2, 0, is_record)  # a copy, without a log
    restored = three.restore()
    check(restored, 14)
    total = sum(restored[0].sources.values())
    assert total and restored[1].sources["memory"] + restored[1].sources.get("peers", 0) == total
    assert restored[1].sources["memory"] == restored[0].sources["peers"] > 0  # where the data is
    assert not seen


def test_a_host_whose_log_is_lost_is_not_missed(three: SomeHosts) -> None:
    three.place(1, 0, is_record)
    three.place(2, 1, is_data)
    check(three.restore(), 14)
    check(three.restore(step=12), 12)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_processes_take_what_the_hosts_that_are_left_have(three: SomeHosts, count: int) -> None:
    three.place(0, 0, lambda name: not is_data(name))
    three.place(0, 1, is_data)
    check(three.restore(count), 14)


def test_a_step_that_lacks_a_file_on_all_hosts_is_named_and_the_older_one_taken(three: SomeHosts, seen: Seen) -> None:
    three.place(0, 0, lambda name: not is_data(name))
    three.place(1, 1, lambda name: is_data(name) and not name.startswith(of(14)))
    check(three.restore(), 12)
    assert {(type(event), event.step) for event in seen} == {(events.HeldStepDropped, 14)}
    assert all("state/ocdbt.process_0/" in event.reason and "is missing" in event.reason for event in seen)


def flipped(body: bytes) -> bytes:
    at = len(body) // 2
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda body: body[:-1], lambda body: bytes(len(body))])
@pytest.mark.parametrize(
    "what", ["/state/ocdbt.process_", "/state/d/", "manifest.ocdbt", "manifest.json", "intent.json"]
)
def test_what_one_of_two_copies_has_wrong_comes_from_the_other_and_is_named(
    what: str, damage: Any, three: SomeHosts, seen: Seen
) -> None:
    three.place(0, 0, lambda name: True)
    three.place(2, 0, is_record)
    three.place(2, 0, is_data)
    (name,) = (name for name in three.files if name.startswith(of(14)) and what in name)
    three.place(0, 0, lambda one: one == name, damage(three.files[name]))
    check(three.restore(), 14)
    dropped = {(event.source, event.file) for event in seen if isinstance(event, events.CopyDropped)}
    assert dropped and {file for _, file in dropped} == {name.split("/", 3)[3]}
    assert not [event for event in seen if isinstance(event, events.HeldStepDropped)]
    assert any("/host-0/" in source for source, _ in dropped), "on its own host"


def test_a_process_that_finds_no_whole_copy_has_all_take_the_older_step(three: SomeHosts, seen: Seen) -> None:
    three.place(0, 0, lambda name: True)
    (name,) = (name for name in three.files if name.startswith(of(14)) and is_data(name))
    three.place(0, 0, lambda one: one == name, flipped(three.files[name]))
    check(three.restore(), 12)
    dropped = [event for event in seen if isinstance(event, events.HeldStepDropped)]
    assert {event.step for event in dropped} == {14}


def test_a_peer_that_vanishes_between_its_offer_and_the_reading_is_replaced_and_named(
    three: SomeHosts, seen: Seen
) -> None:
    three.place(0, 0, lambda name: not is_data(name))
    for host in (1, 2):
        three.place(host, 1, is_data)

    def before(name: str, process: int) -> None:
        if name == "restore: step 14 fits" and process == 1:
            server = tier_hosts.meet(oc.memory(), job.members[1], three.run, 1.0).reach.server
            assert server
            server.close()

    job = Together(3, before)
    with three.servers(job):
        restored = three.restore_with(job)
    check(restored, 14)
    assert restored[0].sources["peers"] == restored[2].sources["memory"] == restored[1].sources["memory"]
    dropped = {(type(event), event.file.rpartition("/")[0]) for event in seen}
    assert dropped == {(events.CopyDropped, "state/ocdbt.process_0/d")}, "by process 0, which begins with that host"


def test_of_a_committed_step_what_is_in_tiers_comes_from_there_and_the_rest_from_the_store(
    three: SomeHosts, seen: Seen
) -> None:
    in_store = three.root / of(10)
    three.files = {
        str(path.relative_to(three.root)): path.read_bytes() for path in in_store.rglob("*") if path.is_file()
    }
    three.place(0, 999_999_999, lambda name: name.endswith("intent.json"))  # as a prefetch leaves it
    restored = three.restore()
    check(restored, 10)
    assert [set(one.sources) for one in restored] == [{"store"}] * 3

    three.place(1, 999_999_999, is_data)
    restored = three.restore()
    check(restored, 10)
    total = sum(restored[0].sources.values())
    assert all(sum(one.sources.values()) == total for one in restored)
    assert restored[0].sources["peers"] == restored[1].sources["memory"] == restored[2].sources["peers"] > 0

    (name,) = filter(is_data, three.files)
    three.place(1, 999_999_999, is_data, flipped(three.files[name]))
    restored = three.restore()
    check(restored, 10)
    assert [set(one.sources) for one in restored] == [{"store"}] * 3
    assert {(type(event), event.file) for event in seen} == {(events.CopyDropped, name.split("/", 3)[3])}

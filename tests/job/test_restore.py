"""Restoring with a process that finds something else: all take one decision, and only proof changes anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator import arrays
from orchestrator.job.read_step import ReadOptions
from orchestrator.job.restore import RestoreOptions, restore_together
from tests.support.peers import OfTwo, same
from tests.support.runs import LIKE, fill, journal_of, store_of
from tests.support.snapshots import snapshot

OPTIONS = RestoreOptions(timeout_s=1.0)


def claims(kind: str) -> Callable[[str, Any], Any]:
    """Process 1 reports this of step 2, and of others what process 0 reports."""
    claim = {"type": "failure", "kind": kind, "text": "w: chunk w/c/0 is wrong", "chunks": ["w/c/0"]}
    return lambda name, value: claim if name == "restore: step 2" else value


def test_damage_on_another_host_counts_only_if_process_0_sees_it_too(root: Path) -> None:
    fill(root, 1, 2)
    store = store_of(root)
    before = snapshot(root)
    with pytest.raises(oc.Unavailable, match=r"process 1 \(host-1\): w: chunk .*; process 0 finds it as it was saved"):
        restore_together(store, OfTwo(claims("Damaged")), LIKE, OPTIONS)
    assert snapshot(root) == before
    file = max(root.glob("steps/00000002/*/state/**/d/*"), key=lambda path: path.stat().st_size)
    body = file.read_bytes()
    file.write_bytes(bytes([body[0] ^ 1]) + body[1:])
    restored = restore_together(store, OfTwo(claims("Damaged")), LIKE, OPTIONS)
    assert restored is not None and restored.step == 1
    event = journal_of(root)[-2].event
    assert (event.kind, event.step) == ("quarantined", 2)


@pytest.mark.parametrize("kind", ["Unavailable", "StorageError", "OutcomeUnknown"])
def test_what_another_host_cannot_read_stops_all_and_changes_nothing(root: Path, kind: str) -> None:
    fill(root, 1, 2)
    before = snapshot(root)
    with pytest.raises(oc.Unavailable, match=r"step 2 .* cannot be read now, .* process 1 \(host-1\): w: "):
        restore_together(store_of(root), OfTwo(claims(kind)), LIKE, OPTIONS)
    assert snapshot(root) == before


@pytest.mark.parametrize("kind", ["NewerFormat", "Mismatch", "KeyError"])
def test_what_no_other_step_would_help_against_is_raised_on_all(root: Path, kind: str) -> None:
    fill(root, 1, 2)
    before = snapshot(root)
    with pytest.raises(oc.OrchestratorError, match=r"process 1: .*w: chunk") as caught:
        restore_together(store_of(root), OfTwo(claims(kind)), LIKE, OPTIONS)
    assert not isinstance(caught.value, oc.Damaged) and snapshot(root) == before


def test_a_host_with_damage_of_its_own_raises_the_fault_that_stops_all(root: Path) -> None:
    fill(root, 1, 2)
    for file in root.glob("steps/00000002/*/state/**/d/*"):
        file.unlink()
    theirs = {"type": "failure", "kind": "NewerFormat", "text": "format 9"}
    job = OfTwo(lambda name, value: theirs if name == "restore: step 2 fits" else value)
    with pytest.raises(oc.NewerFormat, match="process 1: format 9"):
        restore_together(store_of(root), job, LIKE, OPTIONS)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (OPTIONS, []),
        (RestoreOptions(timeout_s=1.0, load_once=True), []),  # of arrays that are not exchanged
        (RestoreOptions(timeout_s=1.0, read=ReadOptions(attest=True)), ["restore: step 2 fingerprints"]),
    ],
    ids=["plain", "load_once", "attest"],
)
def test_a_restore_meets_the_other_hosts_three_times_and_once_to_attest(
    root: Path, options: RestoreOptions, more: list[str]
) -> None:
    fill(root, 1, 2)
    job = OfTwo(same)
    assert restore_together(store_of(root), job, LIKE, options)
    assert job.met == ["restore: which step", "restore: step 2 fits", "restore: step 2", *more]


def as_process_1(root: Path, theirs: dict[str, Any]) -> OfTwo:
    """The rendezvous of process 1, beside a process 0 that chooses what it would choose here, answers `theirs`, and
    else as process 1 does."""
    chooses = OfTwo(same)
    restore_together(store_of(root), chooses, LIKE, RestoreOptions(timeout_s=1.0, record=False))
    choice = {"restore: which step": chooses.sent["restore: which step"]}
    return OfTwo(lambda name, value: (choice | theirs).get(name, value), process=1)


def test_every_host_raises_its_own_mismatch_with_all_its_lines(root: Path) -> None:
    fill(root, 1)
    theirs = {"restore: step 1 fits": {"type": "failure", "kind": "Mismatch", "text": "other"}}
    for job in (OfTwo(lambda name, value: theirs.get(name, value)), as_process_1(root, theirs)):
        with pytest.raises(oc.Mismatch) as caught:
            restore_together(store_of(root), job, {"v": LIKE["w"]}, OPTIONS)
        assert len(caught.value.problems) > 1


def test_a_host_that_finds_nothing_wrong_follows_process_0(root: Path) -> None:
    fill(root, 1, 2)
    claim = {"type": "failure", "kind": "Damaged", "text": "w: is gone"}
    job = as_process_1(root, {"restore: step 2": claim, "restore: step 2 damage": {"value": True}})
    with pytest.raises(oc.Damaged, match=r"step 2 e0001-a01 cannot be restored: process 0 \(host-0\): w: is gone"):
        restore_together(store_of(root), job, LIKE, RestoreOptions(timeout_s=1.0, strict=True))
    assert job.met[-2:] == ["restore: step 2", "restore: step 2 damage"]


# Arrays that are exchanged.


@dataclass
class Exchanging:
    """A group of one array, which a restore reads and would exchange."""

    wanted: list[Any]
    signature: str = "aa"
    positions: list[int] = field(default_factory=lambda: [1])
    exchanges: int = 0

    @property
    def slab_requests(self) -> list[Any]:
        return [self.wanted[place] for place in self.positions]

    def exchanged(self, values: list[Any]) -> list[Any]:
        self.exchanges += 1
        return values


FAILURE = {"type": "failure", "kind": "Unavailable", "text": "no answer"}
ONCE: dict[str, tuple[Any, type[Exception], str]] = {
    "has failed": (FAILURE, oc.Unavailable, r"cannot be read now, .* process 1 \(host-1\): no answer"),
    "exchanges another array": ({"type": "exchange", "arrays": "bb"}, oc.UsageError, "ask for different arrays"),
    "exchanges none": ({"type": "done"}, oc.UsageError, "ask for different arrays"),
}


@pytest.mark.parametrize("how", ONCE)
def test_an_exchange_that_a_peer_will_not_join_is_not_begun(
    root: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, error, said = ONCE[how]
    fill(root, 1)
    groups: list[Exchanging] = []
    monkeypatch.setattr(arrays, "exchange_groups", lambda requests: groups.append(Exchanging(requests)) or groups)
    job = OfTwo(lambda name, value: theirs if name == "restore: step 1" else value)
    with pytest.raises(error, match=said):
        restore_together(store_of(root), job, LIKE, RestoreOptions(timeout_s=1.0, load_once=True))
    assert groups[0].exchanges == 0 and job.met.count("restore: step 1") == 1, "nobody is met a second time"


def test_a_host_that_fails_reports_it_where_the_others_meet_to_exchange(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, 1)
    groups: list[Exchanging] = []
    monkeypatch.setattr(arrays, "exchange_groups", lambda requests: groups.append(Exchanging(requests)) or groups)

    def fails(*arguments: Any) -> list[Any]:
        raise oc.Unavailable("no answer", waited=True)

    options = RestoreOptions(timeout_s=1.0, load_once=True, read=ReadOptions(reader=fails))
    job = OfTwo(lambda name, value: {"type": "exchange", "arrays": "aa"} if name == "restore: step 1" else value)
    with pytest.raises(oc.Unavailable, match=r"process 0 \(host-0\): no answer"):
        restore_together(store_of(root), job, LIKE, options)
    assert job.met[-1] == "restore: step 1" and groups[-1].exchanges == 0

"""`orchestrator doctor` of a run that holds steps in memory."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from orchestrator import environment
from orchestrator.cli import tier_checks
from orchestrator.cli.finding import ExaminedRun, Finding
from orchestrator.rules import keys
from orchestrator.rules.codec import encode
from orchestrator.rules.placement import PlacedHost, Placement
from orchestrator.rules.records import FORMAT
from orchestrator.run.tier_room import Room
from tests.support.runs import store_of
from tests.support.tiers import crashed_at_14, held_dir

DAY_S = 86400.0
A_RUN = "0123456789abcdef"


@pytest.fixture
def held(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(environment.TIER_DIR, str(root.parent / "tier"))
    return held_dir(crashed_at_14(root))


def found(root: Path) -> list[Finding]:
    store = store_of(root)
    return list(tier_checks.tiers(ExaminedRun(store, True, None, store.require_head())))


def put_placement(held: Path, *notes: str, epoch: int = 1) -> None:
    hosts = tuple(PlacedHost(f"vm-{name}", (number,), (1 - number,)) for number, name in enumerate("ab"))
    made = Placement(FORMAT, epoch, time.time() + 1, "rack", 1, "node", hosts, notes)
    (held / keys.PLACEMENT).write_bytes(encode(made))


def limit(held: Path, beside_bytes: int) -> None:
    room = Room(str(held.parent))
    room.record(room.measure().used + beside_bytes)


def damage(held: Path) -> None:
    next(held.glob("steps/00000014/*/manifest.json")).write_bytes(b"{}")


def leave_another_run(held: Path, age_s: float) -> Path:
    other = Path(shutil.copytree(held.parent, held.parent.with_name(A_RUN)))
    for where, _, _ in os.walk(other):
        os.utime(where, (time.time() - age_s,) * 2)
    return other


CASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "all is well": (lambda held: None, ()),
    "copies are where they were asked for": (put_placement, ()),
    "copies are not where they were asked for": (
        lambda held: put_placement(held, "all hosts are in one rack", "2 hosts: 1 of the 2 copies"),
        ("all hosts are in one rack; a held step survives the loss of", "2 hosts: 1 of the 2 copies; a held"),
    ),
    "an earlier start had them elsewhere": (lambda held: put_placement(held, "no rack is known", epoch=0), ()),
    "a held step is damaged": (damage, ("step 14 cannot be restored from memory: ",)),
    "bytes_max leaves no room for another step": (
        lambda held: Room(str(held.parent)).record(100),
        ("the next step needs about",),
    ),
    "bytes_max leaves room once older steps have gone": (lambda held: limit(held, beside_bytes=500), ()),
    "the limit cannot be read": (lambda held: (held.parent / "room" / "limit").write_text("1 GB"), ("ERROR",)),
    "another run was here an hour ago": (lambda held: leave_another_run(held, 3600), ()),
    "another run has been gone for two days": (
        lambda held: leave_another_run(held, 2 * DAY_S),
        (f"{A_RUN}: another run holds",),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_be_lost_and_what_has_no_room_is_found(case: str, root: Path, held: Path) -> None:
    harm, expected = CASES[case]
    harm(held)
    before = {path: path.stat().st_mtime_ns for path in held.parents[1].rglob("*")}
    if expected == ("ERROR",):
        with pytest.raises(Exception, match="is no number of bytes; remove this file"):
            found(root)
        return
    findings = found(root)
    wrong = [one for one in findings if one.level != "ok"]
    assert len(wrong) == len(expected), findings
    for finding, text in zip(wrong, expected, strict=True):
        assert finding.level == "warn" and text in finding.text and finding.do, finding
    assert {path: path.stat().st_mtime_ns for path in held.parents[1].rglob("*")} == before, "doctor has written"


def test_a_machine_that_holds_nothing_says_so(root: Path, held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.TIER_DIR, str(root.parent))
    assert [(one.level, one.text) for one in found(root)] == [
        ("ok", "this machine holds no steps of the run in memory")
    ]


def test_what_a_step_survives_is_told_of_this_start_alone(root: Path, held: Path) -> None:
    head = store_of(root).require_head()
    placed = Placement(FORMAT, head.epoch, time.time(), "node", 1, "node", (PlacedHost("vm-a", (0,)),))
    assert [one.level for one in tier_checks.copies(placed, head.epoch)] == ["ok"]
    text = next(tier_checks.copies(replace(placed, notes=("no",)), head.epoch + 1)).text
    assert "which holds none here" in text

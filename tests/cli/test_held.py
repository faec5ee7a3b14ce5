"""Held steps as `ls` and `watch` show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import main
from orchestrator.rules import keys
from orchestrator.rules.codec import encode
from orchestrator.rules.placement import PlacedHost, Placement
from orchestrator.rules.records import FORMAT
from tests.support.runs import LIKE
from tests.support.tiers import SomeHosts, agent, crash, crashed_at_14, held_dir, train


@pytest.fixture
def crashed(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_TIER_DIR", str(root.parent / "tier"))
    return crashed_at_14(root)


def said(command: str, root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[dict[str, Any]]]:
    """What people see, and what programs do of held steps."""
    more = ["--once"] if command == "watch" else []
    capsys.readouterr()
    main(["orchestrator", command, str(root), *more])
    text = capsys.readouterr().out
    main(["orchestrator", command, str(root), *more, "--json"])
    return text, json.loads(capsys.readouterr().out)["held"]


@pytest.mark.parametrize("command", ["ls", "watch"])
def test_held_steps_are_shown_with_what_a_restart_would_take(
    command: str, crashed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, held = said(command, crashed, capsys)
    assert [(one["step"], one["newer"], one["problem"]) for one in held] == [(14, True, ""), (12, True, "")]
    assert "step 14 held in memory" in text and "a restart on this machine takes it" in text

    next(held_dir(crashed).glob("steps/00000014/*/state/ocdbt.process_0/d/*")).unlink()
    text, held = said(command, crashed, capsys)
    assert "is missing" in held[0]["problem"] and held[1]["problem"] == ""
    assert "cannot be restored" in text and "step 12 held in memory" in text

    running = agent(crashed, save=1)
    running.restore(LIKE)
    train(running, 17)
    crash(running)
    text, held = said(command, crashed, capsys)
    assert not any(one["newer"] for one in held) and "the store has a newer one" in text


def test_where_no_tier_is_nothing_is_said_of_it(
    crashed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_TIER_DIR", str(crashed.parent / "elsewhere"))
    text, held = said("ls", crashed, capsys)
    assert held == [] and "held" not in text


PLACED = Placement(
    format=FORMAT,
    epoch=1,
    time=1.0,
    asked="slice",
    copies_asked=1,
    level="slice",
    hosts=(PlacedHost("vm-a", (0,), (1,), slice="s0"), PlacedHost("vm-b", (1,), (0,), slice="s1")),
)


@pytest.mark.parametrize("command", ["ls", "watch"])
def test_steps_of_several_hosts_are_shown_with_their_copies_and_what_may_be_lost(
    command: str, crashed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = SomeHosts(crashed, tmp_path / "hosts", 2)
    hosts.files[keys.PLACEMENT] = encode(PLACED)
    hosts.place(0, 0, lambda name: "/state/ocdbt" not in name)
    monkeypatch.setenv("ORCHESTRATOR_TIER_DIR", str(hosts.tier(0)))
    text, held = said(command, crashed, capsys)
    assert [(one["hosts"], one["copies"], one["survives"], one["parts"]) for one in held] == [
        (["vm-a", "vm-b"], 1, "any one slice", [])
    ] * 2
    assert "is missing" in held[0]["problem"], "of this machine alone"
    line = next(line for line in text.splitlines() if "step 14 held" in line)
    assert "on vm-a, vm-b, 1 copy; may be lost: any one slice; a restart of these hosts takes it" in line

    hosts.place(0, 1, lambda name: "/state/ocdbt" in name)  # the copy
    assert said(command, crashed, capsys)[1][0]["problem"] == ""


def planned(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, Any]:
    capsys.readouterr()
    main(["orchestrator", "plan", str(root), *flags])
    text = capsys.readouterr().out
    main(["orchestrator", "plan", str(root), *flags, "--json"])
    return text, json.loads(capsys.readouterr().out)


def test_a_plan_foretells_where_the_bytes_of_a_restart_come_from(
    crashed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, plan = planned(crashed, capsys)
    assert (plan["step"], plan["sources"]) == (14, {"memory": plan["read_bytes"]}) and "from memory" in text
    assert planned(crashed, capsys, "--step=12")[1]["step"] == 12
    _, plan = planned(crashed, capsys, "--step=10")
    assert (plan["step"], plan["sources"]) == (10, {"store": plan["read_bytes"]})

    hosts = SomeHosts(crashed, tmp_path / "hosts", 2)
    hosts.files[keys.PLACEMENT] = encode(PLACED)
    hosts.place(0, 0, lambda name: "/state/ocdbt" not in name)
    hosts.place(1, 0, lambda name: "/state/ocdbt" in name)
    monkeypatch.setenv("ORCHESTRATOR_TIER_DIR", str(hosts.tier(0)))
    _, plan = planned(crashed, capsys, "--mesh=data=2", "--processes=2")
    assert [host["sources"] for host in plan["hosts"]] == [{"memory": 2048}] * 2, "each host has a copy"

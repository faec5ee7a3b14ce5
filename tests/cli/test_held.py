"""Held steps as `ls` and `watch` show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import main
from tests.support.runs import LIKE
from tests.support.tiers import agent, crash, crashed_at_14, held_dir, train


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

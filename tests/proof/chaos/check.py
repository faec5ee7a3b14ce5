"""What must hold of a run after a round, seen from outside: by the command line, and by the contract's invariants."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage
from tests.proof.model import invariants

CLI_DEADLINE_S = 60


def cli(root: Path | str, command: str, *flags: str) -> tuple[int, Any, str]:
    """(exit code, what `--json` printed, standard error) of `orchestrator COMMAND ROOT`."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", command, str(root), *flags, "--json"],
        capture_output=True,
        text=True,
        timeout=CLI_DEADLINE_S,
    )
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else None, done.stderr


def story(path: Path) -> list[dict[str, Any]]:
    """What the processes of all incarnations said, in order; a line that a kill has cut short says nothing."""
    lines = [line for part in sorted(path.parent.glob(path.name + ".*")) for line in part.read_text().splitlines()]
    said = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return sorted(said, key=lambda line: line["time"])


def violations(root: Path | str, said: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each thing that is not as promised."""
    said = list(said)
    told = {(line["step"], line["epoch"]) for line in said if line["event"] == "saved"}
    code, listed, error = cli(root, "ls")
    if code == 3:
        return ["the run is gone"] if told else []  # killed before the first entry
    if code:
        return [f"ls: exit code {code}: {error}"]
    store = JournalStore(open_storage(str(root)), writer="campaign")
    heads = list(store.entries())
    problems = invariants.linear(heads)
    good = [step["step"] for step in listed["steps"] if step["trust"] != "quarantined"]
    problems += invariants.listing(heads[-1], good, listed["newest"])
    committed = {
        (head.event.step, int((head.event.attempt or "e0")[1:5])) for head in heads if head.event.kind == "committed"
    }
    problems += [
        f"4: step {step} of epoch {epoch} was reported as saved, not journalled"
        for step, epoch in sorted(told - committed)
    ]
    if told and (not good or max(good) < max(step for step, _ in told)):
        problems.append(f"1: step {max(told)[0]} was reported as saved, the newest is {good[-1:] or None}")
    code, report, error = cli(root, "verify", "--all", "--repair_journal=never")
    if code and told:
        problems.append(f"2: verify: exit code {code}: {error or report}")
    problems += [f"wrong bytes restored: {line}" for line in said if line["event"] == "wrong"]
    return problems


def leftovers(root: Path | str) -> list[str]:
    """Attempts that `gc` would still delete, after a whole `gc`."""
    code, report, error = cli(root, "gc")
    if code not in (0, 3):
        return [f"gc: exit code {code}: {error or report}"]
    if code == 3:
        return []
    again = cli(root, "gc", "--dry_run")[1]
    return [f"gc leaves {again['attempts']}"] * bool(again["attempts"])

"""The compat manager in a job of two processes: handlers of a program's own, step directories, continuous saves."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp

from orchestrator.cli.main import main
from tests.support.processes import job

JOB = Path(__file__).parents[1] / "support" / "jobs" / "orbax_several_job.py"


def test_own_handlers_step_directories_and_continuous_saves_are_those_of_all_processes(tmp_path: Path) -> None:
    with job(2, 2, tmp_path / "runs", tmp_path / "logs", program=JOB) as running:
        (first,), (second,) = (running.wait_for(process, "done", 120) for process in (0, 1))
        assert running.wait(60) == [0, 0], running.story()
    assert (first.pop("loader"), second.pop("loader")) == (["0 at 50", "of all"], ["1 at 50", "of all"])
    assert first == second, "processes agree on each save"
    assert first["whole"] and first["again"]
    assert first["best"] == [[0, 0], [0, 0], [2, 2], [2, 2], [None]], "the newest goes, and the only one by name"

    saved = first["continuous"]
    assert saved[0] == 0 and len(saved) >= 5, "a save begins once the last one has ended"
    assert first["steps"] == saved[-2:]
    names = [str(step) for step in saved[-2:]]
    assert first["views"] == sorted([names[-1], "50"]) and first["loader_files"] == [
        "loader-0.txt",
        "loader-1.txt",
        "shared.txt",
    ]
    assert first["deleted"] == [names[-1]] and first["end"] == sorted([names[-1], "60"])

    root = tmp_path / "runs" / "run"
    assert main(["orchestrator", "verify", str(root), "--all"]) == 0
    with ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(read_only=True)) as theirs:
        found = theirs.restore(60, args=ocp.args.Composite(state=ocp.args.StandardRestore({"w": jnp.zeros(16)})))
    assert found["state"]["w"].tolist() == [60.0 + number for number in range(16)]
    assert (root / "60" / "loader" / "loader-1.txt").read_text() == "1 at 60"

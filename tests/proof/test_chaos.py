"""The campaign itself, a few rounds of it; `make chaos` runs hundreds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.proof.chaos import check, faults
from tests.proof.chaos.arena import REPOSITORY, Arena

pytestmark = pytest.mark.jobs


def test_a_zombie_is_fenced_and_ends_with_5_and_the_run_keeps_its_promises(tmp_path: Path) -> None:
    arena = Arena(tmp_path, tmp_path / "run")
    try:
        assert faults.zombie("commit.before", 0).run(arena) == "fenced, exit code 5", arena.tail()
        assert check.violations(arena.root, arena.story()) + check.leftovers(arena.root) == []
    finally:
        assert arena.end() == []


def test_the_campaigns_check_notices_a_lost_step_and_a_changed_byte(tmp_path: Path) -> None:
    arena = Arena(tmp_path, tmp_path / "run")
    try:
        assert arena.wait(arena.launch(), 60) == 0, arena.tail()
    finally:
        arena.end()
    told = arena.story()
    assert check.violations(arena.root, told) == []
    file = next(arena.root.glob("steps/00000004/*/state/ocdbt.process_0/d/*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [line[:2] for line in check.violations(arena.root, told)] == ["2:"]
    file.write_bytes(whole)
    (arena.root / "journal" / f"{6:020}.json").rename(tmp_path / "gone")
    assert check.violations(arena.root, told) != []


def test_the_campaign_notices_a_crash_whatever_the_job_made_of_it(tmp_path: Path) -> None:
    arena = Arena(tmp_path, tmp_path / "run")
    for signum in ("SIGSEGV", "SIGABRT"):  # JAX's client aborts survivors
        arena.wait(arena.start([sys.executable, "-c", f"import os, signal; os.kill(os.getpid(), signal.{signum})"]), 20)
    (crash,) = arena.crashes()
    assert crash.startswith("a process crashed: Fatal Python error: Segmentation fault | ")
    assert arena.crashes() == []


def test_the_campaigns_command_runs_rounds_and_prints_a_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.proof.chaos", "--rounds=1", "--only=clock", f"--report={tmp_path}/report.md"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| clock jumps | 1 | no difference: 1 |" in (tmp_path / "report.md").read_text()

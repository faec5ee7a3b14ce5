"""The demo, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.jobs

REPO = Path(__file__).parents[2]
SMALL = [f"--train=--{size}" for size in ("layers=1", "width=32", "batch_size=8", "length=32")]


def demo(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.demo", *flags]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=570, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("storage", ["local", "gcs"])
def test_the_demo_shows_a_kill_and_a_resume_on_another_mesh_bit_for_bit(tmp_path: Path, storage: str) -> None:
    done = demo(f"--root={tmp_path / 'demo'}", "--steps=31", f"--storage={storage}", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok  ") == 5 and "\nNO" not in done.stdout
    texts = (r"host-2 was killed while step (\d+) was being saved", r"the job resumed from step (\d+), the newest")
    cut, restored = (int(step) for text in texts for step in re.findall(text, done.stdout))
    assert 0 < restored < cut == 30 and "bit for bit" in done.stdout
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (summary["process_count"], summary["device_count"], summary["restored_step"]) == (2, 4, restored)


def test_the_demo_deletes_only_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not yours")
    done = demo(f"--root={tmp_path}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "was not made by the demo" in done.stderr and (tmp_path / "mine.txt").exists()

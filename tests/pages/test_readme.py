"""README's loop, as it stands there, killed just before it commits a step: it resumes, and says what is not saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import orchestrator as oc
from tests.pages.pages import ROOT, blocks

SAYS = "Step 99 is not among them, so it is not saved"


def runs(folder: Path, failpoints: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_FAILPOINTS": failpoints}
    return subprocess.run(
        [sys.executable, "train.py"], cwd=folder, env=environ, capture_output=True, text=True, timeout=120
    )


def test_the_loop_of_the_readme_resumes_where_it_was_killed_and_ends_as_it_says(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (loop,) = [block.source for block in blocks(text) if block.language == "python"]
    assert "every(10)" in loop and ", 100):" in loop and SAYS in " ".join(text.split())
    told = loop.replace('oc.Agent("my-run", ', 'oc.Agent("my-run", options=oc.Options(progress=True), ')  # no terminal
    (tmp_path / "train.py").write_text(told)
    killed = runs(tmp_path, "commit.before=kill@step=50")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert oc.open_run(tmp_path / "my-run").latest_step() == 40
    again = runs(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "restored step 40: " in again.stderr
    assert "steps 91 to 99 are not saved: the newest that is: 90; save(..., force=True) saves the last" in again.stderr
    steps = oc.open_run(tmp_path / "my-run").all_steps()
    assert steps == [40, 70, 80, 90]  # the one that was restored, and last(3), with the best among them

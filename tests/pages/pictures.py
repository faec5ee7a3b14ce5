"""`make pictures`: the pictures of docs/images that show a screen, made from a run that is made for them.

A job of four simulated hosts trains; one is frozen (SIGSTOP), and `orchestrator watch` says which. Only the name of the
run in the picture is another: its directory is a temporary one.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from orchestrator.cli import watch
from orchestrator.cli.watch_page import page
from orchestrator.cli.watch_view import RunNow
from orchestrator.errors import OrchestratorError

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
NAME = "gs://bucket/run"
_HOSTS, _FROZEN, _SAVES = 4, 2, 3
_DEADLINE_S = 180
_SCREEN = (80, 24)
# A picture must not load fonts from another host: these are the reader's own.
_FACES = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        train = ["train", f"--root={run}", "--steps=100000", "--save_every=20", "--step_delay_s=0.1"]
        launch = [sys.executable, "-m", "orchestrator", "launch"]
        with subprocess.Popen(
            [*launch, "local", f"--processes={_HOSTS}", "--", *launch, *train],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as job:
            try:
                wait_for(run, lambda now: len(now.commits) >= _SAVES and now.verdict == "HEALTHY")
                hosts = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
                os.kill(hosts[_FROZEN], signal.SIGSTOP)
                frozen = wait_for(run, lambda now: sum(host.condition == "waiting" for host in now.hosts) == _HOSTS - 1)
                os.kill(hosts[_FROZEN], signal.SIGCONT)
            finally:
                job.terminate()
                job.wait(_DEADLINE_S)
    (IMAGES / "watch.svg").write_text(drawn(replace(frozen, root=NAME)))


def wait_for(run: Path, enough: Callable[[RunNow], bool]) -> RunNow:
    """The run, once `enough` says so. Raises TimeoutError with what is known of it then."""
    end = time.monotonic() + _DEADLINE_S
    known = "nothing"
    while time.monotonic() < end:
        try:
            now = next(watch.follow(str(run), {"interval_s": 1.0, "events_dir": None}))
        except OrchestratorError as error:  # it has not begun
            known = str(error)
        else:
            known = f"{now.verdict} {now.why}"
            if enough(now):
                return now
        time.sleep(1)
    raise TimeoutError(f"{run}: after {_DEADLINE_S} s: {known}")


def drawn(now: RunNow) -> str:
    """The screen of `orchestrator watch`, as an SVG."""
    screen = Console(file=io.StringIO(), record=True, width=_SCREEN[0], force_terminal=True, highlight=False)
    screen.print(*page(now, _SCREEN), sep="\n")
    return _FACES.sub("", screen.export_svg(title=f"orchestrator watch {NAME}", unique_id="watch"))


if __name__ == "__main__":
    main()

"""Where a round happens: directories, and processes that are surely ended, by their ids, within bounds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.proof.chaos import check

REPOSITORY = Path(__file__).parents[3]
MARK = "CHAOS_ROUND"
CRASHES = ("Segmentation fault", "Bus error", "Floating point exception", "Illegal instruction")


class Hang(Exception):
    """Something took longer than its bound."""


@dataclass
class Arena:
    """One run and what was said about it. Several rounds may follow each other in one arena: `steps` is as far as the
    last one went. `url`: of a run that is not at `root`."""

    base: Path
    root: Path
    steps: int = 0
    url: str = ""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # found by a round that checks before it takes the run away

    @property
    def story_file(self) -> Path:
        return self.base / "story"

    def story(self, event: str = "") -> list[dict[str, Any]]:
        return [line for line in check.story(self.story_file) if event in ("", line["event"])]

    def start(self, command: Sequence[str], **environ: str) -> subprocess.Popen[bytes]:
        log = self.base / f"log-{len(self.logs)}"
        self.logs.append(log)
        # An empty ORCHESTRATOR_* environment: the campaign may itself run below a launcher.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env={**inherited, MARK: self.mark, "PYTHONFAULTHANDLER": "1", **environ},
        )
        self.jobs.append(started)
        return started

    def launch(
        self, *job_args: str, more: int = 5, flags: Sequence[str] = (), processes: int = 2, **environ: str
    ) -> subprocess.Popen[bytes]:
        """Start the job, `more` steps further than before, under the launcher."""
        self.steps += more
        launcher = [sys.executable, "-m", "launch", "local", f"--processes={processes}"]
        quick = ["--backoff_s=0.1", "--end_grace_s=2"]
        return self.start([*launcher, *quick, *flags, "--", *self.job(*job_args)], **environ)

    def job(self, *job_args: str) -> list[str]:
        module = [sys.executable, "-m", "tests.proof.chaos.job", self.url or str(self.root), str(self.story_file)]
        return [*module, f"steps={self.steps}", *job_args]

    def wait(self, job: subprocess.Popen[bytes], deadline_s: float) -> int:
        try:
            return job.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise Hang(f"still running after {deadline_s:g} s: {self.tail()}") from None

    def until(self, what: str, true: Callable[[], Any], deadline_s: float, job: subprocess.Popen[bytes]) -> Any:
        """What `true()` returns once it is. Raises Hang at the deadline, or if `job` ends before."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if found := true():
                return found
            if job.poll() is not None and not true():
                raise Hang(f"the job ended with {job.returncode} before: {what}: {self.tail()}")
            time.sleep(0.05)
        raise Hang(f"not within {deadline_s:g} s: {what}: {self.tail()}")

    def check(self) -> None:
        root = self.url or self.root
        self.problems += check.violations(root, self.story()) + check.leftovers(root)

    def tail(self) -> str:
        text = self.logs[-1].read_text(errors="replace") if self.logs else ""
        return " | ".join(line for line in text.splitlines() if "Gloo" not in line and "    @" not in line)[-1500:]

    def crashes(self) -> list[str]:
        """Where a process crashed in a round that has ended: no fault makes that right. (JAX's client aborts by design
        when a peer is lost.)"""
        found = []
        for log in self.logs:
            lines = log.read_text(errors="replace").splitlines()
            fatal = [
                n for n, line in enumerate(lines) if any(f"Fatal Python error: {what}" in line for what in CRASHES)
            ]
            found += [f"a process crashed: {' | '.join(lines[n : n + 12])}" for n in fatal]
        self.logs.clear()
        return found

    def running(self) -> list[int]:
        """Processes of this arena that are there, whoever started them: by the mark in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environ = (entry / "environ").read_bytes()
                    alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                except OSError:  # it has ended, or is not ours
                    continue
                if alive and f"{MARK}={self.mark}".encode() in environ.split(b"\0"):
                    found.append(int(entry.name))
        return found

    def end(self) -> list[int]:
        """Kill what is left, by id, and return what was left a second after the jobs had ended."""
        for _ in range(20):
            left = self.running()
            if not left:
                break
            time.sleep(0.1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for job in self.jobs:
            job.wait(10)
        self.jobs.clear()
        return left


def stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False

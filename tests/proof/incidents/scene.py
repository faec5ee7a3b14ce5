"""Where an incident happens: a job of two hosts under a launcher, and how the tools are asked about it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.gcs_emulator.process import EmulatorProcess
from orchestrator.cli.watch import follow
from orchestrator.cli.watch_page import page
from orchestrator.cli.watch_view import RunNow
from orchestrator.errors import OrchestratorError
from tests.proof.chaos.arena import Arena
from tests.support.processes import free_port
from tests.support.token_server import Tokens, service_account

BUCKET = "rehearsal"
TOOL_S = 120.0


class GuardedBucket:
    """A bucket that wants a token, a token server for the job and one for the people who look after it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._emulator = EmulatorProcess([BUCKET])
        self._job, people = Tokens(folder), Tokens(folder)
        people.word = "people"
        self._guard("good", "people")
        self.environ = self._environ(folder / "job", self._job)
        self.people = self._environ(folder / "people", people)

    def _environ(self, folder: Path, tokens: Tokens) -> dict[str, str]:
        folder.mkdir()
        key = folder / "key.json"
        key.write_text(json.dumps(service_account(tokens.host)))
        url = self._emulator.url
        return {
            "GOOGLE_APPLICATION_CREDENTIALS": str(key),
            "FSSPEC_GCS_ENDPOINT_URL": url,
            "FSSPEC_GS_ENDPOINT_URL": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def _guard(self, *words: str) -> None:
        status, _, body = self._emulator.ask(
            "PUT", f"/_emulator/guards/{BUCKET}", json.dumps({"tokens": words}).encode()
        )
        assert status == 200, body

    def revoke(self) -> None:
        self._job.mode = "invalid_grant"
        self._guard("people")

    def close(self) -> None:
        self._emulator.end()


@dataclass
class Look:
    """What a tool said first that was expected: `seconds` after the strike."""

    seconds: float
    text: str


@dataclass
class Scene:
    base: Path
    url: str
    ports: tuple[int, int]
    bucket: GuardedBucket | None = None
    struck: float = 0.0
    said: dict[str, str] = field(default_factory=dict)  # tool -> what it says
    verdicts: list[Look] = field(default_factory=list)  # of watch, each change of it
    first: float | None = None  # seconds from the strike until watch said what is expected

    def __post_init__(self) -> None:
        self.arena = Arena(self.base, Path(self.url))
        self._looks: Iterator[RunNow] | None = None

    @property
    def folder(self) -> Path:
        return self.base / "job"

    @property
    def local(self) -> Path:
        return Path(self.url)

    @property
    def events(self) -> str | None:
        return str(self.base / "events") if self.bucket else None

    def start(self, flags: tuple[str, ...], args: tuple[str, ...]) -> None:
        command = [sys.executable, "-m", "launch", "local", "--processes=2", *flags, "--"]
        command += [sys.executable, "-m", "tests.proof.incidents.job", self.url, str(self.folder)]
        command += [f"port={self.ports[0]}", *args, *([f"events={self.events}"] if self.events else [])]
        self.launcher = self.arena.start(command, JAX_PLATFORMS="cpu", **(self.bucket.environ if self.bucket else {}))

    def pid(self, index: int) -> int:
        return int((self.folder / f"pid-{index}").read_text())

    def look(self) -> RunNow | None:
        """One look of `watch`, None where the run is not there yet."""
        if self._looks is None:
            self._looks = follow(self.url, {"interval_s": 0.01, "events_dir": self.events})
        try:
            return next(self._looks)
        except (OrchestratorError, StopIteration):
            self._looks = None
            return None

    def page(self, now: RunNow) -> str:
        console = Console(file=io.StringIO(), width=140, highlight=False)
        console.print(*page(now, (140, 40)), sep="\n")
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def ask(self, tool: str, *more: str) -> str:
        """What the command says."""
        command = [sys.executable, "-m", "orchestrator", tool, self.url, *more]
        command += [f"--events_dir={self.events}"] if self.events else []
        environ = {**os.environ, "COLUMNS": "120"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, env=environ)
        except subprocess.TimeoutExpired:
            return f"no answer within {TOOL_S:g} s"
        return f"{done.stdout.strip()}\n{done.stderr.strip()}\nexit code {done.returncode}"

    def report(self) -> str:
        """The sentences on top of the page."""
        said = self.ask("report", "--json")
        try:
            made: dict[str, Any] = json.JSONDecoder().raw_decode(said)[0]
        except ValueError:
            return said
        return "\n".join(one["text"] for one in (made["verdict"], *made["findings"]))

    def since(self) -> float:
        return time.monotonic() - self.struck


def new_ports() -> tuple[int, int]:
    """Two in a row."""
    while True:
        first = free_port()
        if first < 60_000:
            return first, first + 1

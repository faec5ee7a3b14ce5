"""A job of simulated hosts under the launcher, what its processes say, and how its hosts are lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.proof.chaos.arena import Arena

QUICK = ("--backoff_s=0.05", "--end_grace_s=1", "--max_restarts=100000", "--step_back_after=100000")
Line = dict[str, Any]


class Scene:
    """One job from its start to its end, through any number of restarts. flags: the launcher's. args: the job's.

    hosts: so many have to say what all are waited for to say; set it where a restart has fewer."""

    def __init__(self, base: Path, root: str, hosts: int, flags: Sequence[str], args: Sequence[str]) -> None:
        base.mkdir(parents=True)
        self.hosts, self._story, self.lines = hosts, base / "story", list[Line]()
        self._read, self.flags = [0] * hosts, tuple(flags)
        self._arena = Arena(base, base / "run")
        self._logs = base / "logs"
        launcher = [sys.executable, "-m", "launch", "local", f"--processes={hosts}", f"--log_dir={self._logs}"]
        job = [sys.executable, "-m", "tests.proof.recovery.job", root, str(self._story)]
        # What a compiler has made before is no part of what is measured; a host that comes back has it on its disk.
        cache = {"JAX_COMPILATION_CACHE_DIR": str(base / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        cache["PYTHONDONTWRITEBYTECODE"] = ""
        self._job = self._arena.start([*launcher, *QUICK, *flags, "--", *job, *args], **cache)

    def poll(self) -> list[Line]:
        """All that has been said so far, in order of time."""
        for index in range(len(self._read)):
            with suppress(FileNotFoundError), Path(f"{self._story}.{index}").open("rb") as file:
                file.seek(self._read[index])
                whole = file.read().rpartition(b"\n")[0]
                self._read[index] += len(whole) + 1 if whole else 0
                self.lines += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        self.lines.sort(key=lambda line: float(line["time"]))
        return self.lines

    def said(self, event: str, restart: int) -> dict[int, Line]:
        """The first such line of each process in that start of the job."""
        found: dict[int, Line] = {}
        for line in self.poll():
            if line["event"] == event and line["restart"] == restart:
                found.setdefault(line["process"], line)
        return found

    @property
    def restart(self) -> int:
        """The newest start of the job that anybody has spoken in."""
        return max((int(line["restart"]) for line in self.poll()), default=0)

    def all_said(self, event: str, after: int = -1) -> int | None:
        """The start, later than `after`, in which all have said it."""
        for restart in range(self.restart, after, -1):
            if len(self.said(event, restart)) >= self.hosts:
                return restart
        return None

    def until(self, what: str, true: Callable[[], Any], deadline_s: float) -> Any:
        """What `true()` returns once it is no None. Raises Hang."""
        return self._arena.until(what, lambda: [found] if (found := true()) is not None else [], deadline_s, self._job)[
            0
        ]

    def end_processes(self, hosts: Collection[int], signum: int) -> float:
        """Send all of them a signal at once. Returns when."""
        restart = self.restart
        pids = [line["pid"] for host, line in self.said("started", restart).items() if host in hosts]
        now = time.time()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        return now

    def timeline(self) -> list[Line]:
        """What the launcher has recorded."""
        path = self._logs / "launch.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"}")]

    def tail(self) -> str:
        return self._arena.tail()

    def wait(self, deadline_s: float) -> int:
        return self._arena.wait(self._job, deadline_s)

    def end(self) -> list[int]:
        """End the job. Returns the processes that were left a while after."""
        if self._job.poll() is None:
            self._job.send_signal(signal.SIGTERM)
            with suppress(Exception):
                self._job.wait(5)
        if self._job.poll() is None:
            self._job.send_signal(signal.SIGINT)  # the second: kill
            with suppress(Exception):
                self._job.wait(5)
        try:
            return self._arena.end()
        except ProcessLookupError:  # it ended by itself between the look and the signal
            return self._arena.end()

"""Starting, reading and surely ending the processes that a test needs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import forks

STATE_JOB = Path(__file__).parent / "jobs" / "state_job.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """N processes of one job, by index; their standard output goes to files below `logs`."""

    def __init__(
        self,
        count: int,
        devices: int,
        root: Path,
        logs: Path,
        environ: dict[str, str] | None = None,
        program: Path = STATE_JOB,
        **args: object,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.outputs = [logs / f"{index}.jsonl" for index in range(count)]
        self.errors = [logs / f"{index}.err" for index in range(count)]
        settings = [f"{name}={value}" for name, value in args.items()]
        inherited = {**os.environ, "PYTHONPATH": str(forks.REPOSITORY), **(environ or {})}
        self.processes = [
            forks.start(
                [*map(str, (program, index, count, devices, port, root)), *settings],
                inherited,
                self.outputs[index].open("w"),
                self.errors[index].open("w"),
                number=index,
            )
            for index in range(count)
        ]

    def said(self, process: int, event: str) -> list[dict[str, Any]]:
        lines = self.outputs[process].read_text().splitlines()
        parsed = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in parsed if line["event"] == event]

    def wait_for(
        self, process: int, event: str, deadline_s: float, at_least: int = 1, text: str = ""
    ) -> list[dict[str, Any]]:
        """Until `process` has said `event`, in a line with `text`, `at_least` times; fails the test with the
        job's story if it does not."""
        end = time.monotonic() + deadline_s

        def found() -> list[dict[str, Any]]:
            return [line for line in self.said(process, event) if text in json.dumps(line)]

        while time.monotonic() < end:
            ended = self.processes[process].poll() is not None  # before the look: its last words count
            if len(lines := found()) >= at_least:
                return lines
            if ended:
                break
            time.sleep(0.02)
        raise AssertionError(f"process {process} did not say {event!r} within {deadline_s} s\n{self.story()}")

    def wait(self, deadline_s: float) -> list[int]:
        """Exit codes of all, in order; fails the test if one is still running at the deadline."""
        end = time.monotonic() + deadline_s
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a process hangs beyond {deadline_s} s\n{self.story()}") from None
        return [process.returncode for process in self.processes]

    def kill(self, process: int) -> None:
        self.processes[process].send_signal(signal.SIGKILL)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait(10)

    def story(self) -> str:
        parts = []
        for index, (out, err) in enumerate(zip(self.outputs, self.errors, strict=True)):
            lines = [line for line in err.read_text().splitlines() if "[Gloo]" not in line]
            parts.append(f"--- {index}\n{out.read_text()[-2000:]}\n" + "\n".join(lines[-30:]))
        return "\n".join(parts)


@contextmanager
def job(count: int, devices: int, root: Path, logs: Path, **args: Any) -> Iterator[Job]:
    """A running job that is ended, by its ids, whatever the test does."""
    running = Job(count, devices, root, logs, **args)
    try:
        yield running
    finally:
        running.end()

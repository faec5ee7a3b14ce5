"""Jobs of a benchmark: real processes of one of its modules, each started with `--worker INDEX PORT PORT2`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

JOB_LIMIT_S = 2400  # the rounds of (d) took 26 minutes on a slow machine
# PyTorch then asks for huge pages as NumPy does by itself: without, its restores are of page faults.
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def directory(path: str) -> str:
    """For argparse: a directory that is there."""
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is no directory; make it first")
    return path


def run(
    module: str,
    arguments: list[str],
    processes: int,
    environment: Mapping[str, str] | None = None,
    python: str = sys.executable,
    limit_s: float = JOB_LIMIT_S,
) -> Any:
    """The JSON object that process 0 printed. If it printed none, ends the program with what all complained of."""
    ports = [str(_free_port()) for _ in range(2)]
    command = [python, "-m", module, *arguments, "--worker"]
    surroundings = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **_HUGE_PAGES, **(environment or {})}
    with contextlib.ExitStack() as stack:
        complaints = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        workers = [
            subprocess.Popen(
                [*command, str(index), *ports],
                stdout=subprocess.DEVNULL if index else subprocess.PIPE,
                stderr=complaints[index],
                env=surroundings,
            )
            for index in range(processes)
        ]
        try:
            out, _ = workers[0].communicate(timeout=limit_s)
            line = next((line for line in out.decode().splitlines() if line.startswith("{")), None)
            if line is None:
                sys.exit(f"{module}: process 0 gave no result\n" + "".join(map(_end, complaints)))
            for worker in workers[1:]:
                worker.wait(60)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    return json.loads(line)


def _end(complaints: IO[bytes]) -> str:
    complaints.seek(0)
    return complaints.read().decode(errors="replace")[-2000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Starting launchers of small scripts without JAX, and looking for what they leave behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0  # on a machine with much else to do
INDEX = "import os; i = int(os.environ['ORCHESTRATOR_PROCESS_INDEX'])\n"


def job(flags: list[str], script: str) -> list[str]:
    return ["local", *flags, "--", sys.executable, "-S", "-c", INDEX + script]


def launch_command(flags: list[str], script: str) -> list[str]:
    return [sys.executable, "-m", "launch", *job(flags, script)]


def launch(flags: list[str], script: str) -> subprocess.CompletedProcess[str]:
    command = launch_command(flags, script)
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S)


def as_in_the_foreground(ignored: Collection[int] = ()) -> None:
    """In a launcher that a test starts, before its program: a shell's background job, as the tests may be,
    ignores SIGINT, and under nohup SIGHUP; what it starts inherits that."""
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)


@contextmanager
def launched(flags: list[str], script: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        launch_command(flags, script),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_the_foreground,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_S)


def eventually(holds: Callable[[], bool], deadline_s: float = DEADLINE_S) -> bool:
    give_up = time.monotonic() + deadline_s
    while time.monotonic() < give_up:
        if holds():
            return True
        time.sleep(0.02)
    return False


def write_pid(directory: Path) -> str:
    """Script lines that leave this process's id in `directory`, whole or not at all."""
    return (
        f"import pathlib; f = pathlib.Path({str(directory)!r}, f'{{os.getpid()}}.part')\n"
        "f.write_text(''); f.rename(f.with_suffix('.pid'))\n"
    )


def pids(directory: Path) -> list[int]:
    return [int(path.stem) for path in directory.glob("*.pid")]


def alive(directory: Path) -> list[int]:
    found = []
    for pid in pids(directory):
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found

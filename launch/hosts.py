"""The processes of one start of a job on this machine: each host's own, and what it has started.

A host is stopped by a signal to one process: the one in which its agent runs, as its heartbeat says, or else the
one that was started. Its data workers are not signalled, as the last save needs them. SIGKILL goes to all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Collection
from io import FileIO
from pathlib import Path
from typing import IO

from launch import warden
from launch.contract import HEARTBEAT_FILE, JobContract
from launch.lines import Lines

REAP_S = 10.0  # for the kernel to carry out a SIGKILL
_SET_SUBREAPER, _GET_SUBREAPER = 36, 37  # of prctl(2)


class Warden:
    """The helper process that ends our hosts if we are killed; see `launch/warden.py`."""

    def __enter__(self) -> Warden:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(warden.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def _write(self, line: str) -> None:
        # If the warden is gone its care is lost; the job need not be.
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(f"{line}\n".encode())
            self._pipe.flush()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def guard(self, identity: warden.HostIdentity) -> None:
        self._write(f"+{identity.leader} {identity.started} {identity.mark.hex()}")

    def release(self, pid: int) -> None:
        self._write(f"-{pid}")

    def remove_afterwards(self, directory: Path) -> None:
        """A directory to delete, with all that is in it, if we cannot."""
        self._write(f">{os.fsencode(directory).hex()}")

    def removed(self, directory: Path) -> None:
        """It is gone, or is to stay."""
        self._write(f"<{os.fsencode(directory).hex()}")

    def __exit__(self, *_: object) -> None:
        try:
            self._pipe.close()
            self._process.wait(timeout=REAP_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(timeout=REAP_S)


class LocalHost:
    """One host: the process that was started for it, its output so far, its log."""

    def __init__(self, process: subprocess.Popen[bytes], contract: JobContract, heartbeat: Path) -> None:
        self.process, self.contract = process, contract
        self.log: FileIO | None = None
        self.index, self.name, self.pid = contract.process_index, contract.host_name, process.pid
        self.lines = Lines()
        self.sent: set[int] = set()  # signals, by the supervisor
        mark = f"{HEARTBEAT_FILE}={os.fspath(heartbeat)}"
        self.identity = warden.identity_of(process.pid, os.fsencode(mark))
        assert process.stdout is not None
        self.output = process.stdout
        os.set_blocking(self.output.fileno(), False)

    def send_signal(self, signum: int, agent_pid: int | None) -> None:
        """Signal the host's own process: `agent_pid` if that one is of this host, or else the one that was started.

        `python train.py` below a shell script is an example: the shell would die of SIGTERM, and its end would be the
        host's, in the middle of the save.
        """
        if agent_pid not in (None, self.pid):
            table = warden.all_processes()
            agent = table.get(agent_pid)
            if agent and agent.pid in warden.members(table, self.identity) and warden.signal_one(agent, signum):
                return
        # Not reaped yet, so the id is its own.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL everything that this host has started, and itself."""
        first = True

        def find(table: dict[int, warden.ProcessInfo]) -> set[int]:
            nonlocal first
            found = warden.members(table, self.identity)
            if first:  # after the search: descendants are found by their parents, who are about to go
                first = False
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            return found

        warden.kill_all(find)

    def has_ended(self) -> bool:
        """True once the process has ended; it stays unreaped, so that its group id stays its own."""
        return self._outcome() is not None

    def has_failed(self) -> bool:
        outcome = self._outcome()
        return outcome is not None and outcome.si_status != 0

    def _outcome(self) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


class Orphans:
    """While open, this process is the parent of descendants whose own parent has died (a child subreaper), so that
    none of them is lost sight of, whatever it has done to its session and its environment.

    Only where `sole`: this process has no children but the job's. Elsewhere others' children look like a host's;
    there, a host's orphans are known by their session, their group and their mark.
    """

    def __init__(self, sole: bool) -> None:
        self.ours: set[int] = set()  # children of the job that are no host's, by their ids
        mine = {process.pid for process in warden.all_processes().values() if process.parent == os.getpid()}
        # In a container process 1 adopts whatever its own `exec` has started.
        self._active = sole and not mine and os.getpid() != 1
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Orphans:
        before = ctypes.c_int(0)
        if self._active:
            self._libc.prctl(_GET_SUBREAPER, ctypes.byref(before), 0, 0, 0)
            self._active = self._libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0) == 0
        self._before = before.value
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._libc.prctl(_SET_SUBREAPER, self._before, 0, 0, 0)

    def _adopted(self, table: dict[int, warden.ProcessInfo], children: Collection[int]) -> set[int]:
        own = os.getpid()
        known = {*children, *self.ours}
        return {process.pid for process in table.values() if process.parent == own and process.pid not in known}

    def reap(self, children: Collection[int]) -> None:
        """Take note of those that have ended; `children` are ours by right, and are reaped by whoever started them."""
        if not self._active:
            return
        for pid in self._adopted(warden.all_processes(), children):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)

    def kill(self, children: Collection[int]) -> None:
        """SIGKILL what is left, with all that descends from it; no host may be running any more."""
        if self._active:
            warden.kill_all(lambda table: warden.descendants(table, self._adopted(table, children)))
            self.reap(children)

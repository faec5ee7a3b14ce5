"""Python programs as processes of their own that find JAX and the package imported, which is most of what a small job
computes: forked from a server that has imported them and done nothing else.

Whoever wants what only a fresh interpreter has, such as other variables that JAX reads, gets one. Two servers take
turns, so that strings hash differently in one process of a job and in the next, as they do on hosts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).parents[2]
ENVIRON = {**os.environ, "PYTHONPATH": str(REPOSITORY)}  # of the servers
IMPORTED = ("jax.numpy", "jax.experimental.multihost_utils", "orchestrator.agent", "orchestrator.reader")
_OWN = ("ORCHESTRATOR_", "PYTEST_")  # read by our code, when it needs them
_NUMBER = struct.Struct("i")


class Forked:
    """A process that a server has forked, to be used like a `Popen`."""

    def __init__(self, pid: int, told: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._told = told

    def poll(self) -> int | None:
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._end(timeout)) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def _end(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            said = self._told.recv(_NUMBER.size)
            self._told.close()
            if not said:
                raise AssertionError("the server that forks processes has died")
            (self.returncode,) = _NUMBER.unpack(said)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """A process that has imported modules, and waits for programs to run."""

    def __init__(self, imported: Sequence[str] = IMPORTED, environ: Mapping[str, str] = ENVIRON) -> None:
        self.environ = environ
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(theirs.fileno()), *imported]
        with theirs:
            self._process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        atexit.register(self.close)

    def start(self, command: Sequence[str], environ: Mapping[str, str], out: IO[Any], err: IO[Any]) -> Forked:
        told, theirs = socket.socketpair()
        with theirs:
            request = json.dumps({"command": [*command], "environ": dict(environ), "directory": os.getcwd()})
            files = [out.fileno(), err.fileno(), theirs.fileno()]
            socket.send_fds(self._control, [request.encode()], files)
        (pid,) = _NUMBER.unpack(told.recv(_NUMBER.size))
        return Forked(pid, told)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@functools.cache
def _server(number: int, imported: Sequence[str]) -> Server:
    return Server(imported)


def start(
    command: Sequence[str],
    environ: Mapping[str, str],
    out: IO[Any],
    err: IO[Any],
    *,
    number: int = 0,
    imported: Sequence[str] = IMPORTED,
) -> Forked | subprocess.Popen[bytes]:
    """Run a Python program (a path, or `-m` and a module) and its arguments; forked if that makes no difference."""
    if _outside(environ) != _outside(ENVIRON):
        return subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, env=environ)
    return _server(number % 2, imported).start(command, environ, out, err)


def _outside(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_OWN)}


# In the server.


def serve(control: socket.socket) -> dict[str, Any]:
    """Returns in each process that it forks, with what that is to run. The server ends when nobody can ask any more."""
    running = dict[int, tuple[int, socket.socket]]()  # by a descriptor that is readable once the process has ended
    while True:
        for ready in select.select([control, *running], [], [])[0]:
            if ready in running:
                pid, told = running.pop(ready)
                os.close(ready)
                _tell(told, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                told.close()
                continue
            body, files, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not body:
                os._exit(0)
            if not (pid := os.fork()):
                os.dup2(files[0], 1)
                os.dup2(files[1], 2)
                for descriptor in (
                    control.detach(),
                    *files,
                    *running,
                    *(told.detach() for _, told in running.values()),
                ):
                    os.close(descriptor)
                return dict(json.loads(body))
            told = socket.socket(fileno=files.pop())
            _tell(told, pid)
            running[os.pidfd_open(pid)] = pid, told
            for descriptor in files:
                os.close(descriptor)


def _tell(told: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # whoever has started it is gone
        told.send(_NUMBER.pack(number), socket.MSG_NOSIGNAL)


def _run(command: list[str], environ: dict[str, str], directory: str) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if command[0] == "-m":
        sys.path[0], sys.argv = directory, command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(command[0]).parent), command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with whoever has started it
    for _name in sys.argv[2:]:
        importlib.import_module(_name)
    gc.freeze()  # so that nothing writes to the memory that is shared
    _request = serve(socket.socket(fileno=int(sys.argv[1])))
    gc.unfreeze()
    _run(**_request)

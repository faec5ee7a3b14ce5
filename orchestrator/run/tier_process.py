"""Starting a tier server beside this process, and ending it. Any thread."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from orchestrator import environment
from orchestrator.errors import StorageError
from orchestrator.rules import peer_protocol

_SOURCES = str(Path(__file__).parents[2])  # the server is of the version that this process has, wherever that is from
_START_S = 30.0
_END_S = 5.0
_LINE_BYTES_MAX = 4096


class TierServer:
    """A tier server that ends with this process, however that dies: it reads the end of its standard input."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self._process, self.address = process, address

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def close(self, timeout_s: float = _END_S) -> None:
        """End it; by force if it does not end by itself. Closing again is harmless."""
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)


def start(
    base: str,
    secret: bytes,
    *,
    listen: str = "127.0.0.1:0",
    sock: socket.socket | None = None,
    run: str | None = None,
    timeout_s: float = _START_S,
    wait: bool = True,
    log: int | None = None,
) -> TierServer:
    """A tier server for what is below `base` (`<directory>/orchestrator-<uid>`), listening at `listen` (port 0: any
    that is free), or on `sock`, which is bound already and stays this process's to close. run: the only one that it
    serves; None: all. Returns when it listens. Raises StorageError saying why it does not. wait False, with `sock`,
    where requests wait for it: returns at once. log: where its log goes, as `subprocess` takes it; None: to this
    process's standard error."""
    listen = listen if sock is None else f"fd:{sock.fileno()}"
    command = [sys.executable, "-m", "orchestrator.run.tier_server", f"--directory={base}", f"--listen={listen}"]
    command += [] if run is None else [f"--run={run}"]
    environ = {name: value for name, value in os.environ.items() if name != environment.TIER_SECRET}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_SOURCES, environ.get("PYTHONPATH"))))
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if wait else subprocess.DEVNULL,
            stderr=log,
            env=environ,
            start_new_session=True,
            pass_fds=() if sock is None else (sock.fileno(),),
        )
        assert process.stdin
    except OSError as error:
        raise StorageError(f"the tier server cannot be started: {error}") from error
    server = TierServer(process, "")
    try:
        with suppress(BrokenPipeError):  # it has ended: its line, or its code, says why
            process.stdin.write(secret.hex().encode() + b"\n")
            process.stdin.flush()
        if wait:
            server.address = _address(_line(process, timeout_s), process, listen, timeout_s)
        elif sock is not None:
            server.address = peer_protocol.show_address(*sock.getsockname()[:2])
    except BaseException:
        server.close(0.1)
        raise
    finally:
        if process.stdout:
            process.stdout.close()
    return server


def _line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """Its first line, as far as it comes in time."""
    assert process.stdout
    line, end = b"", time.monotonic() + timeout_s
    descriptor, ready = process.stdout.fileno(), select.poll()  # select() knows 1024 descriptors
    ready.register(descriptor, select.POLLIN)
    while not line.endswith(b"\n") and len(line) < _LINE_BYTES_MAX:
        if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
            break
        if not (more := os.read(descriptor, _LINE_BYTES_MAX)):
            break
        line += more
    return line


def _address(line: bytes, process: subprocess.Popen[bytes], listen: str, timeout_s: float) -> str:
    with suppress(ValueError, TypeError, KeyError):
        told = json.loads(line)
        if "error" in told:
            raise StorageError(f"the tier server does not listen at {listen}: {told['error']}")
        return str(told["address"])
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(0.5)
        raise StorageError(f"the tier server ended with code {code} before it listened at {listen}; its log says why")
    raise StorageError(f"the tier server did not listen at {listen} within {timeout_s:g} s")

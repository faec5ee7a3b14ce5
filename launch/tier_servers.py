"""The tier servers of simulated hosts, which outlive the hosts' processes: survivors' memory is not read again."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch import warden
from launch.command import LaunchError
from launch.hosts import Orphans, Warden
from orchestrator.errors import StorageError
from orchestrator.rules import peer_protocol
from orchestrator.run import tier_process
from orchestrator.run.tier_process import TierServer

STARTS_MAX = 5  # of one machine's server, in one job
_END_S = 2.0


@dataclass
class _Running:
    """listening: held here, so that the address is known at once, and stays while the server is started again."""

    directory: Path
    log: Path
    listening: socket.socket
    server: TierServer | None = None
    starts: int = 0


class TierServers:
    """By machine. They end with this process, however that dies. One thread."""

    def __init__(self, secret: bytes, warden: Warden, orphans: Orphans, note: Callable[[str], None]) -> None:
        self._secret, self._warden, self._orphans, self._note = secret, warden, orphans, note
        self._running: dict[int, _Running] = {}

    def __iter__(self) -> Iterator[int]:
        return iter(self._running)

    def __contains__(self, machine: int) -> bool:
        return machine in self._running

    def address(self, machine: int) -> str:
        return peer_protocol.show_address(*self._running[machine].listening.getsockname()[:2])

    def start(self, machine: int, directory: Path, logs: Path | None) -> int:
        """Start a machine's server, for the tiers below `directory`, on loopback; it logs to `logs/tier-MACHINE.log`.
        Returns its process's id. Raises LaunchError."""
        listening = socket.socket()
        try:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
        except OSError as error:
            listening.close()
            raise LaunchError(f"a tier server cannot listen on loopback: {error.strerror}") from error
        log = logs / f"tier-{machine}.log" if logs else Path(os.devnull)
        self._running[machine] = one = _Running(directory, log, listening)
        self._start(one)
        assert one.server is not None
        return one.server.pid

    def _start(self, one: _Running) -> None:
        base = os.path.join(os.path.realpath(one.directory), f"orchestrator-{os.getuid()}")
        one.starts += 1
        try:
            with open(one.log, "ab") as log:
                server = tier_process.start(base, self._secret, sock=one.listening, wait=False, log=log.fileno())
        except (OSError, StorageError) as error:
            raise LaunchError(f"tier server: {error}") from error
        one.server = server
        self._orphans.ours.add(server.pid)
        mark = f"tier server {server.pid}".encode()  # nobody else has it: its session tells what is its own
        self._warden.guard(warden.identity_of(server.pid, mark))

    def watch(self) -> None:
        """Start again what has died, a few times. Requests wait meanwhile."""
        for machine, one in self._running.items():
            if one.server is None or one.server.running:
                continue
            self._forget(one.server)
            one.server = None
            if one.starts < STARTS_MAX:
                self._note(f"the tier server of machine {machine} has died; started again")
                self._start(one)
            else:
                self._note(f"the tier server of machine {machine} has died {one.starts} times; left so")
                one.listening.close()

    def lose(self, machine: int) -> None:
        """It goes as its machine does: at once, in the middle of whatever it does."""
        self._end(self._running.pop(machine), 0.0)

    def close(self) -> None:
        running, self._running = self._running, {}
        for one in running.values():
            if one.server is not None and one.server.running:
                os.kill(one.server.pid, signal.SIGTERM)  # all at the same time; its id is ours until it is waited for
        for one in running.values():
            self._end(one, _END_S)

    def _end(self, one: _Running, timeout_s: float) -> None:
        if one.server is not None:
            one.server.close(timeout_s)
            self._forget(one.server)
        one.listening.close()

    def _forget(self, server: TierServer) -> None:
        self._warden.release(server.pid)
        self._orphans.ours.discard(server.pid)

"""The processes of one start of a job on this machine: they are started, read, signalled, reaped and logged here.

What is to be done about their exits is decided elsewhere (`supervise`). Each leads a session and a process group of its
own, and only what is proven to descend from it is ever signalled (`hosts`, `warden`). A host is signalled before its
leader is reaped: until then the kernel cannot give its id to anybody else. One thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from launch.command import LaunchError
from launch.contract import HEARTBEAT_FILE, JobContract
from launch.heartbeats import Heartbeats
from launch.hosts import REAP_S, LocalHost, Orphans, Warden
from launch.interrupts import OperatorSignals
from launch.noise import Noise
from launch.supervise import Exit

READ_BYTES = 64 * 1024
ORPHANS_S = 1.0  # from one search for adopted processes that have ended to the next
SAME_MOMENT_S = 0.1  # exits so close together count as one moment's


class HostProcesses:
    """`running`: by process index. `on_line(host, text)` gets each line of output but `Noise`, `on_note(text)` what has
    to be said about it. Leaving the context ends what still runs."""

    def __init__(
        self,
        signals: OperatorSignals,
        orphans: Orphans,
        warden: Warden,
        on_line: Callable[[str, str], None],
        on_note: Callable[[str], None],
    ) -> None:
        self._signals, self._orphans, self._warden = signals, orphans, warden
        self._on_line, self._on_note = on_line, on_note
        self.running: dict[int, LocalHost] = {}
        self._noise = Noise()
        self.heartbeats = Heartbeats()
        warden.remove_afterwards(self.heartbeats.directory)
        self._ended: list[LocalHost] = []
        self._open: set[int] = set()  # indices whose output has not ended
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals.receiver, selectors.EVENT_READ, None)
        self._orphans_at = 0.0

    @property
    def output_is_open(self) -> bool:
        return bool(self._open)

    def start(
        self, command: Sequence[str], environ: Mapping[str, str], contract: JobContract, logs: Path | None
    ) -> None:
        """Start one host; it logs to `logs/HOST.log`. Raises LaunchError."""
        heartbeat = self.heartbeats.path(contract.process_index)
        own = {HEARTBEAT_FILE: str(heartbeat), **contract.to_environment()}
        unbuffered = {"PYTHONUNBUFFERED": "1"}  # A line should be seen when it is written, and survive a SIGKILL.
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **unbuffered, **environ, **own},
            )
        except OSError as error:
            raise LaunchError(f"{command[0]}: cannot be started: {error.strerror}") from error
        host = LocalHost(process, contract, heartbeat)
        self._warden.guard(host.identity)
        if logs is not None:
            host.log = open(logs / f"{host.name}.log", "wb", buffering=0)  # noqa: SIM115 - open as long as the host
        self.running[host.index] = host
        self._open.add(host.index)
        self._selector.register(host.output, selectors.EVENT_READ, host)

    def wait(self, timeout_s: float, *, read: bool = True) -> None:
        """Wait for output, or for a signal. `read` False: the output is left in its pipes, for a reader of ours that is
        behind."""
        if read:
            for key, _ in self._selector.select(timeout_s):
                if isinstance(key.data, LocalHost):
                    self._read(key.data)
        else:
            select.select([self._signals.receiver], [], [], min(timeout_s, 0.05))
        now = time.monotonic()
        for host in self.running.values():
            self._show(host, host.lines.due(now))

    def _read(self, host: LocalHost) -> None:
        try:
            chunk = os.read(host.output.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        self._write_log(host, chunk)
        if not chunk:
            self._selector.unregister(host.output)
            self._open.discard(host.index)
        self._show(host, host.lines.feed(chunk) if chunk else host.lines.end())
        if not chunk:
            for text in self._noise.rest(host.name):
                self._on_line(host.name, text)

    def _show(self, host: LocalHost, lines: Sequence[bytes]) -> None:
        for line in lines:
            for text in self._noise.without(host.name, line.decode("utf-8", "replace")):
                self._on_line(host.name, text)

    def _write_log(self, host: LocalHost, chunk: bytes) -> None:
        if host.log is None:
            return
        try:
            host.log.write(chunk)
        except OSError as error:  # A full disk takes the logs, not the job.
            self._on_note(f"{host.log.name}: {error.strerror}; no more log of {host.name}")
            host.log.close()
            host.log = None

    def reap(self, *, one_may_have_ended_another: bool) -> list[Exit]:
        """The exits since the last call, with what those hosts have left behind killed.

        one_may_have_ended_another: nothing has failed before. A dying process's connections close before it can be
        waited for, so a survivor may crash and be seen first: then the others of the same moment are waited for.
        """
        ended = [host for host in self.running.values() if host.has_ended()]
        if one_may_have_ended_another and any(host.has_failed() for host in ended) and len(ended) < len(self.running):
            time.sleep(SAME_MOMENT_S)
            ended = [host for host in self.running.values() if host.has_ended()]
        exits = []
        for host in ended:
            host.kill()  # what the leader started and left behind
            exits.append(Exit(host.index, host.process.wait(timeout=REAP_S), frozenset(host.sent)))
            self._warden.release(host.pid)
            del self.running[host.index]
            self._ended.append(host)
        now = time.monotonic()
        if now >= self._orphans_at and self._signals.child_ended():
            self._orphans_at = now + ORPHANS_S
            self._orphans.reap(self._children())
        return exits

    def signal(self, processes: Collection[int], signum: int) -> None:
        """SIGKILL goes to all that a host has started, any other signal to the process that its agent runs in."""
        self.heartbeats.poll(time.monotonic())  # which processes the agents are in
        self._noise.interrupted |= signum == signal.SIGINT
        for index in self.running.keys() & set(processes):
            host = self.running[index]
            host.sent.add(signum)
            if signum == signal.SIGKILL:
                host.kill()
            else:
                host.send_signal(signum, self.heartbeats.pids.get(index))

    def __enter__(self) -> HostProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill and reap whatever is left; reached with processes running only if something raised."""
        for host in self.running.values():
            host.kill()
        for host in self.running.values():
            # One that does not die stays with the warden, which kills once more after us.
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.process.wait(timeout=REAP_S)
                self._warden.release(host.pid)
        self._orphans.kill(self._children())
        for host in (*self.running.values(), *self._ended):
            host.output.close()
            if host.log is not None:
                host.log.close()
        self._selector.close()
        self.heartbeats.close()
        self._warden.removed(self.heartbeats.directory)

    def _children(self) -> set[int]:
        return {self._warden.pid, *(host.pid for host in self.running.values())}

"""Runs a job of N JAX processes on this machine and supervises it. Linux only.

One thread, one loop: output, exits and signals all arrive at one selector, so there is nothing to lock and nothing
waits without a bound. What people see is written by threads of `console`, as a reader may never read. What to do about
exits and signals is decided in `supervise`; this file carries it out. Each process leads a session and a process group
of its own, and only what is proven to descend from it is ever signalled (`hosts`, `warden`). A host is signalled before
its leader is reaped: until then the kernel cannot give its id to anybody else.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from launch import logs, plainfile, supervise
from launch.command import LaunchError as LaunchError  # raised by `run`, so part of what this module offers
from launch.console import Console
from launch.contract import HEARTBEAT_FILE, STEP_BACK, JobContract
from launch.heartbeats import Heartbeats
from launch.hosts import REAP_S, Host, Orphans, Warden
from launch.interrupts import Signals

READ_BYTES = 64 * 1024
DRAIN_S = 1.0  # for output still in the pipes after the last process has ended
PATIENCE_S = 2.0  # for whoever reads our output, after the job's end
ORPHANS_S = 1.0  # from one look for adopted processes that have ended to the next
SAME_MOMENT_S = 0.1  # exits so close together count as one moment's


@dataclass(frozen=True)
class LocalJob:
    """What to run. `environ` is added to this process's own; `log_dir` gets `restart-R/host-I.log`, below
    `run-2` and so on if an earlier run has left its logs there. `hosts_file` (one
    host a line) is read before a restart of an elastic job, for at most `wait_for_hosts_s` until enough are there."""

    command: Sequence[str]
    processes: int
    devices_per_process: int = 1
    processes_after_restart: int | None = None
    log_dir: Path | None = None
    hosts_file: Path | None = None
    wait_for_hosts_s: float = 60.0
    environ: Mapping[str, str] = field(default_factory=dict)
    rules: supervise.Rules = field(default_factory=supervise.Rules)

    def validate(self) -> None:
        """Raises: LaunchError with one line, if this job cannot be started."""
        for name, value, minimum in (
            ("processes", self.processes, 1),
            ("devices_per_process", self.devices_per_process, 1),
            ("processes_after_restart", self.processes_after_restart, 1),
            ("max_restarts", self.rules.max_restarts, 0),
        ):
            if value is not None and value < minimum:
                raise LaunchError(f"--{name}={value}: expected at least {minimum}")
        if self.rules.elastic and not 1 <= self.rules.elastic[0] <= self.processes <= self.rules.elastic[1]:
            least, most = self.rules.elastic
            raise LaunchError(f"--elastic={least}:{most}: expected 1 <= MIN <= --processes ({self.processes}) <= MAX")
        if not self.command:
            raise LaunchError("no command to run; put it after --: launch local --processes 2 -- python train.py")
        if shutil.which(self.command[0]) is None:
            raise LaunchError(f"{self.command[0]}: no such program; the command after -- starts with a program")


@dataclass(frozen=True)
class HostView:
    """A running process, for an observer."""

    index: int
    name: str
    pid: int
    restart_count: int


@dataclass(frozen=True)
class Observer:
    """Who hears of the job; every call comes on the thread that called `run`, and must return soon.

    `line(host, text)` for each line of output, `note(text)` for the launcher's own words, `tick(running)` about ten
    times a second. While `behind()`, the hosts' output is left in their pipes (not for long, and not at their end).
    """

    line: Callable[[str, str], None]
    note: Callable[[str], None]
    tick: Callable[[Sequence[HostView]], None] = lambda running: None
    behind: Callable[[], bool] = lambda: False


def run_on_console(job: LocalJob) -> int:
    """`run` for a command line: output to standard output, each line after its host's name, the launcher's words to
    standard error. Nobody need read them. This process may have no children but the job's."""
    job.validate()
    console = Console()
    try:
        return run(job, Observer(console.line, console.note, behind=console.behind), sole=True)
    finally:
        console.close(PATIENCE_S)


def run(job: LocalJob, observer: Observer, *, sole: bool = False) -> int:
    """Run the job to its end, restarts included, and return its exit code (128 + signal for a signal).

    Afterwards no process of it is left. Call on the main thread: it takes over SIGTERM, SIGINT, SIGHUP and SIGCHLD
    meanwhile, but for those that were ignored. A first SIGTERM or SIGINT goes to every host's own process, a second one
    kills; SIGHUP is passed on as SIGTERM and never kills. `sole`: this process has no children but the job's.
    Raises: LaunchError if the job cannot be started; whatever the observer raises, after ending the job.
    """
    job.validate()
    with Signals() as signals, Orphans(sole) as orphans, Warden() as warden:
        for number in sorted(signals.ignored - {signal.SIGHUP}):
            observer.note(f"{supervise.signal_name(number)} is ignored, as it was in whatever started this")
        folder = None if job.log_dir is None else logs.claim(job.log_dir)
        if folder != job.log_dir:
            observer.note(f"logs go to {folder}: an earlier run has left its own in {job.log_dir}")
        history = supervise.History(job.processes)
        while True:
            with _Incarnation(job, observer, signals, orphans, warden, history, folder) as incarnation:
                end = incarnation.watch()
            if isinstance(end, supervise.Finish):
                if end.about:
                    observer.note(end.about)
                return end.code
            for line in end.history.news:
                observer.note(line)
            hosts = _hosts_there(job, end.history, signals.wait)
            history = end.history if hosts is None else replace(end.history, hosts=hosts)
            signum = signals.wait(0.0)
            if hosts is not None and signum is None:
                observer.note(
                    f"restart {history.restarts} on {history.hosts} hosts in {history.delay_s:g} s "
                    f"({history.failures} of {job.rules.max_restarts} failures, {history.preemptions} preemptions)"
                )
                signum = signals.wait(history.delay_s)
            if hosts is None or signum is not None:
                end = supervise.stopped_between(history)
                observer.note(end.about)
                return end.code


def _hosts_there(job: LocalJob, history: supervise.History, wait: Callable[[float], int | None]) -> int | None:
    """Hosts for the next incarnation; None if the operator stops the job meanwhile, which `wait(seconds)` says.

    Raises: LaunchError if the hosts file does not list enough of them in time.
    """
    if history.restarts == 1 and job.processes_after_restart:
        return job.processes_after_restart
    if job.rules.elastic is None:
        return history.hosts
    least, most = job.rules.elastic
    if job.hosts_file is None:
        return min(history.hosts, most)
    give_up = time.monotonic() + job.wait_for_hosts_s
    while True:
        try:
            there = len([line for line in plainfile.read_text(job.hosts_file).splitlines() if line.strip()])
        except OSError as error:
            raise LaunchError(f"--hosts_file {job.hosts_file}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise LaunchError(f"--hosts_file {job.hosts_file}: not text in UTF-8") from error
        if there >= least:
            return min(there, most)
        if time.monotonic() >= give_up:
            raise LaunchError(
                f"--hosts_file {job.hosts_file}: {there} hosts after {job.wait_for_hosts_s:g} s, "
                f"expected {least} or more"
            )
        if wait(0.2) is not None:
            return None


def _hold_loopback_port() -> socket.socket:
    """A free port, held for the job: bound and never listened on. JAX's service shares it (gRPC sets SO_REUSEPORT); a
    launcher beside us that asks the kernel for a free port gets another one. Two services on one port would share
    their jobs' connections, and both jobs would hang."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


class _Incarnation:
    """One start of the job, from the first process to the end of the last. Leaving the context ends what still runs."""

    def __init__(
        self,
        job: LocalJob,
        observer: Observer,
        signals: Signals,
        orphans: Orphans,
        warden: Warden,
        history: supervise.History,
        logs: Path | None,
    ) -> None:
        self._job, self._observer, self._signals = job, observer, signals
        self._orphans, self._warden, self._logs = orphans, warden, logs
        self._history, self._restart_count = history, history.restarts
        self._state = supervise.State(job.rules, frozenset(range(history.hosts)), history)
        self._heartbeats = Heartbeats()
        warden.remove_afterwards(self._heartbeats.directory)
        self._port = _hold_loopback_port()
        self._hosts: dict[int, Host] = {}
        self._open: set[int] = set()  # indices whose output has not ended
        self._selector = selectors.DefaultSelector()
        self._ended: list[Host] = []
        self._orphans_at = 0.0
        self._kill_at: float | None = None
        self._give_up_at: float | None = None
        self._end: supervise.Restart | supervise.Finish | None = None

    def __enter__(self) -> _Incarnation:
        self._selector.register(self._signals.receiver, selectors.EVENT_READ, None)
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def watch(self) -> supervise.Restart | supervise.Finish:
        """Wait for the end, carrying out the supervisor's rules meanwhile."""
        while self._end is None:
            self._wait(0.1)
            for signum in self._signals.received():
                transition = supervise.on_signal(self._state, signum)
                self._observer.note(supervise.heard(signum, transition[1]))
                self._carry_out(transition)
            self._reap()
            self._listen()
            self._kill_the_overdue()
            self._observer.tick([self._view(host) for host in self._hosts.values()])
        give_up = time.monotonic() + DRAIN_S
        while self._open and time.monotonic() < give_up:
            self._wait(0.05)
            self._signals.received()
        return self._end

    def _start(self) -> None:
        address = f"127.0.0.1:{self._port.getsockname()[1]}"
        logs = None
        if self._logs is not None:
            logs = self._logs / f"restart-{self._restart_count}"
            try:
                logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LaunchError(f"--log_dir {self._job.log_dir}: {error.strerror}") from error
        for index in range(self._history.hosts):
            contract = JobContract(
                coordinator_address=address,
                process_count=self._history.hosts,
                process_index=index,
                local_devices=self._job.devices_per_process,
                restart_count=self._restart_count,
                host_name=f"host-{index}",
                grace_period_s=self._job.rules.stop_grace_s / 2 or None,  # the other half is for leaving
            )
            self._spawn(contract, logs)

    def _spawn(self, contract: JobContract, logs: Path | None) -> None:
        told = {HEARTBEAT_FILE: str(self._heartbeats.path(contract.process_index))}
        if self._history.step_back:
            told[STEP_BACK] = str(self._history.step_back)
        unbuffered = {"PYTHONUNBUFFERED": "1"}  # A line should be seen when it is written, and survive a SIGKILL.
        try:
            process = subprocess.Popen(
                list(self._job.command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **unbuffered, **self._job.environ, **told, **contract.to_environment()},
            )
        except OSError as error:
            raise LaunchError(f"{self._job.command[0]}: cannot be started: {error.strerror}") from error
        host = Host(process, contract, self._heartbeats.path(contract.process_index))
        self._warden.guard(host.kin)
        if logs is not None:
            host.log = open(logs / f"{host.name}.log", "wb", buffering=0)  # noqa: SIM115 - open as long as the host
        self._hosts[host.index] = host
        self._open.add(host.index)
        self._selector.register(host.output, selectors.EVENT_READ, host)

    def _children(self) -> set[int]:
        return {self._warden.pid, *(host.pid for host in self._hosts.values())}

    def _view(self, host: Host) -> HostView:
        return HostView(host.index, host.name, host.pid, self._restart_count)

    def _wait(self, timeout_s: float) -> None:
        if self._observer.behind() and self._kill_at is None and self._hosts:
            select.select([self._signals.receiver], [], [], min(timeout_s, 0.05))
        else:
            for key, _ in self._selector.select(timeout_s):
                if isinstance(key.data, Host):
                    self._read(key.data)
        now = time.monotonic()
        for host in self._hosts.values():
            self._show(host, host.lines.due(now))

    def _read(self, host: Host) -> None:
        try:
            chunk = os.read(host.output.fileno(), READ_BYTES)
        except BlockingIOError:
            return
        self._write_log(host, chunk)
        if not chunk:
            self._selector.unregister(host.output)
            self._open.discard(host.index)
        self._show(host, host.lines.feed(chunk) if chunk else host.lines.end())

    def _show(self, host: Host, lines: Sequence[bytes]) -> None:
        for line in lines:
            self._observer.line(host.name, line.decode("utf-8", "replace"))

    def _write_log(self, host: Host, chunk: bytes) -> None:
        if host.log is None:
            return
        try:
            host.log.write(chunk)
        except OSError as error:  # A full disk takes the logs, not the job.
            self._observer.note(f"{host.log.name}: {error.strerror}; no more log of {host.name}")
            host.log.close()
            host.log = None

    def _reap(self) -> None:
        ended = [host for host in self._hosts.values() if host.has_ended()]
        if self._state.cause is None and any(host.has_failed() for host in ended) and len(ended) < len(self._hosts):
            # A dying process's connections close before it can be waited for, so a survivor may crash and be seen
            # first: look again before judging which of them was the cause.
            time.sleep(SAME_MOMENT_S)
            ended = [host for host in self._hosts.values() if host.has_ended()]
        exits = []
        for host in ended:
            host.kill()  # what the leader started and left behind
            exits.append(supervise.Exit(host.index, host.process.wait(timeout=REAP_S)))
            self._warden.release(host.pid)
            del self._hosts[host.index]
            self._ended.append(host)
        now = time.monotonic()
        if now >= self._orphans_at and self._signals.child_ended():
            self._orphans_at = now + ORPHANS_S
            self._orphans.reap(self._children())
        if exits:
            self._hear()  # what they last said, before they are judged
        known = self._state.cause
        transition = supervise.on_exits(self._state, exits)
        cause = transition[0].cause
        if known is None and cause is not None:
            others = f"; ending {len(self._hosts)} others" if self._hosts else ""
            self._observer.note(f"host-{cause.index} {cause.describe()}{others}")
        self._carry_out(transition)

    def _hear(self) -> dict[int, float]:
        silent_s = self._heartbeats.listen(time.monotonic())
        self._state = replace(self._state, steps=dict(self._heartbeats.steps))
        return silent_s

    def _listen(self) -> None:
        """Hear the hosts' heartbeats: how far each is, and whether one has fallen silent."""
        silent_s = self._hear()
        hung_before = self._state.hung
        transition = supervise.on_silence(self._state, silent_s)
        for index in transition[0].hung - hung_before:
            doing = self._heartbeats.doing.get(index, "?")
            self._observer.note(f"host-{index} hangs: silent for {silent_s[index]:.0f} s, last heard {doing}: SIGKILL")
        self._carry_out(transition)

    def _carry_out(self, transition: tuple[supervise.State, tuple[supervise.Effect, ...]]) -> None:
        self._state, effects = transition
        for effect in effects:
            match effect:
                case supervise.Signal(processes, signum, grace_s):
                    killing = signum == signal.SIGKILL
                    self._heartbeats.listen(time.monotonic())  # which processes the agents are in
                    for index in processes & self._hosts.keys() if signum else ():
                        host = self._hosts[index]
                        host.kill() if killing else host.tell(signum, self._heartbeats.pids.get(index))
                    self._kill_at = None if killing else time.monotonic() + grace_s
                    self._give_up_at = time.monotonic() + REAP_S if killing else None
                case supervise.Restart() | supervise.Finish():
                    self._end = effect

    def _kill_the_overdue(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            for host in self._hosts.values():
                self._observer.note(f"{host.name} (pid {host.pid}) did not end in time: SIGKILL")
                host.kill()
            self._kill_at, self._give_up_at = None, now + REAP_S
        if self._give_up_at is not None and now >= self._give_up_at:
            stuck = ", ".join(f"{host.name} (pid {host.pid})" for host in self._hosts.values())
            raise LaunchError(f"{stuck}: still there {REAP_S:.0f} s after SIGKILL; its system call does not return")

    def _close(self) -> None:
        """Kill and reap whatever is left; reached with processes running only if something raised."""
        for host in self._hosts.values():
            host.kill()
        for host in self._hosts.values():
            # One that does not die stays with the warden, which kills once more after us.
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.process.wait(timeout=REAP_S)
                self._warden.release(host.pid)
        self._orphans.kill(self._children())
        for host in (*self._hosts.values(), *self._ended):
            host.output.close()
            if host.log is not None:
                host.log.close()
        self._selector.close()
        self._heartbeats.close()
        self._warden.remove_afterwards(None)
        self._port.close()

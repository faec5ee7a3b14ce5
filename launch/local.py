"""Runs a job of N JAX processes on this machine and supervises it. Linux only.

One thread, one loop: output, exits and signals all arrive at one selector, so there is nothing to lock and nothing
waits without a bound. What to do about them is decided in `supervise`; this file carries it out. Each process leads a
session and a process group of its own, and only groups made here are ever signalled. A group is signalled before its
leader is reaped: until then the kernel cannot give its id to anybody else.
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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from types import FrameType, TracebackType

from launch import command, plainfile, supervise
from launch.command import LaunchError as LaunchError  # raised by `run`, so part of what this module offers
from launch.contract import EXIT_PREEMPTED, HEARTBEAT_FILE, STEP_BACK, JobContract
from launch.heartbeats import Heartbeats

OPERATOR_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LONGEST_LINE_BYTES = 64 * 1024
DRAIN_S = 1.0  # for output still in the pipes after the last process has ended
REAP_S = 10.0  # for the kernel to carry out a SIGKILL
SAME_MOMENT_S = 0.1  # exits so close together count as one moment's


@dataclass(frozen=True)
class LocalJob:
    """What to run. `environ` is added to this process's own; `log_dir` gets `restart-R/host-I.log`. `hosts_file` (one
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
                raise LaunchError(f"--{name}={value}: wanted at least {minimum}")
        if self.rules.elastic and not 1 <= self.rules.elastic[0] <= self.processes <= self.rules.elastic[1]:
            least, most = self.rules.elastic
            raise LaunchError(f"--elastic={least}:{most}: wanted 1 <= MIN <= --processes ({self.processes}) <= MAX")
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
    times a second.
    """

    line: Callable[[str, str], None]
    note: Callable[[str], None]
    tick: Callable[[Sequence[HostView]], None] = lambda running: None


def console_observer() -> Observer:
    """Output to standard output, each line after its host's name; the launcher's words to standard error."""

    def line(host: str, text: str) -> None:
        sys.stdout.write(f"[{host}] {text}\n")
        sys.stdout.flush()

    def note(text: str) -> None:
        command.complain(f"[launch] {text}")

    return Observer(line, note)


def run(job: LocalJob, observer: Observer | None = None) -> int:
    """Run the job to its end, restarts included, and return its exit code (128 + signal for a signal).

    Afterwards no process of it is left. Call on the main thread: it takes over SIGTERM, SIGINT, SIGHUP and SIGCHLD
    meanwhile. A first SIGTERM or SIGINT goes to every process, a second one kills them.
    Raises: LaunchError if the job cannot be started; whatever the observer raises, after ending the job.
    """
    job.validate()
    observer = observer or console_observer()
    with _Signals() as signals, _Warden() as warden:
        history = supervise.History(job.processes)
        while True:
            with _Incarnation(job, observer, signals, warden, history) as incarnation:
                end = incarnation.watch()
            if isinstance(end, supervise.Finish):
                return end.code
            history = replace(end.history, hosts=_hosts_there(job, end.history))
            for line in history.news:
                observer.note(line)
            observer.note(
                f"restart {history.restarts} on {history.hosts} hosts in {history.delay_s:g} s "
                f"({history.failures} of {job.rules.max_restarts} failures, {history.preemptions} preemptions)"
            )
            if signals.wait(history.delay_s):
                return EXIT_PREEMPTED  # asked to stop between two incarnations: nothing runs


def _hosts_there(job: LocalJob, history: supervise.History) -> int:
    """Hosts for the next incarnation. Raises: LaunchError if the hosts file does not list enough of them in time."""
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
                f"--hosts_file {job.hosts_file}: {there} hosts after {job.wait_for_hosts_s:g} s, wanted {least} or more"
            )
        time.sleep(0.2)


def _hold_loopback_port() -> socket.socket:
    """A free port, held for the job: bound and never listened on. JAX's service shares it (gRPC sets SO_REUSEPORT); a
    launcher beside us that asks the kernel for a free port gets another one. Two services on one port would share
    their jobs' connections, and both jobs would hang."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


class _Signals:
    """Turns signals into bytes that a selector can wait for; puts the old handlers back afterwards."""

    def __enter__(self) -> _Signals:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._nothing) for number in (*OPERATOR_SIGNALS, signal.SIGCHLD)}
        return self

    @staticmethod
    def _nothing(_signum: int, _frame: FrameType | None) -> None:
        """The byte in the wakeup socket is all that is wanted."""

    def received(self) -> list[int]:
        """The operator's signals since the last call."""
        try:
            return [number for number in self.receiver.recv(4096) if number in OPERATOR_SIGNALS]
        except BlockingIOError:
            return []

    def wait(self, timeout_s: float) -> bool:
        """Wait for an operator's signal; True if one came."""
        end = time.monotonic() + timeout_s
        while (left_s := end - time.monotonic()) > 0:
            select.select([self.receiver], [], [], left_s)
            if self.received():
                return True
        return False

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self.receiver.close()
        self._sender.close()


class _Warden:
    """The helper process that ends our groups if we are killed; see `launch/warden.py`."""

    def __enter__(self) -> _Warden:
        script = Path(__file__).with_name("warden.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def _tell(self, sign: str, group: int) -> None:
        assert self._process.stdin is not None
        # If the warden is gone its care is lost; the job need not be.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{sign}{group}\n".encode())
            self._process.stdin.flush()

    def guard(self, group: int) -> None:
        self._tell("+", group)

    def release(self, group: int) -> None:
        self._tell("-", group)

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=REAP_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(timeout=REAP_S)


class _Host:
    """One process: its group, its output so far, its log."""

    def __init__(self, process: subprocess.Popen[bytes], contract: JobContract) -> None:
        self.process, self.contract = process, contract
        self.log: FileIO | None = None
        self.index, self.name, self.pid = contract.process_index, contract.host_name, process.pid
        self.partial = b""
        assert process.stdout is not None
        self.output = process.stdout
        os.set_blocking(self.output.fileno(), False)

    def signal_group(self, signum: int) -> None:
        # Not reaped yet, so a missing group is only one whose members have all ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def has_ended(self) -> bool:
        """True once the process has ended; it stays unreaped, so that its group id stays its own."""
        return self._outcome() is not None

    def has_failed(self) -> bool:
        outcome = self._outcome()
        return outcome is not None and outcome.si_status != 0

    def _outcome(self) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def lines(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes; an overlong one is cut instead of growing without end."""
        *complete, self.partial = (self.partial + chunk).split(b"\n")
        if len(self.partial) > LONGEST_LINE_BYTES:
            complete, self.partial = [*complete, self.partial], b""
        return complete


class _Incarnation:
    """One start of the job, from the first process to the end of the last. Leaving the context ends what still runs."""

    def __init__(
        self, job: LocalJob, observer: Observer, signals: _Signals, warden: _Warden, history: supervise.History
    ) -> None:
        self._job, self._observer, self._signals, self._warden = job, observer, signals, warden
        self._history, self._restart_count = history, history.restarts
        self._state = supervise.State(job.rules, frozenset(range(history.hosts)), history)
        self._heartbeats = Heartbeats()
        self._port = _hold_loopback_port()
        self._hosts: dict[int, _Host] = {}
        self._open: set[int] = set()  # indices whose output has not ended
        self._selector = selectors.DefaultSelector()
        self._ended: list[_Host] = []
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
                self._observer.note(f"{supervise.signal_name(signum)} received, passing it to {len(self._hosts)} hosts")
                self._carry_out(supervise.on_signal(self._state, signum))
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
        if self._job.log_dir is not None:
            logs = self._job.log_dir / f"restart-{self._restart_count}"
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
        self._warden.guard(process.pid)
        host = _Host(process, contract)
        if logs is not None:
            host.log = open(logs / f"{host.name}.log", "wb", buffering=0)  # noqa: SIM115 - open as long as the host
        self._hosts[host.index] = host
        self._open.add(host.index)
        self._selector.register(host.output, selectors.EVENT_READ, host)

    def _view(self, host: _Host) -> HostView:
        return HostView(host.index, host.name, host.pid, self._restart_count)

    def _wait(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Host):
                self._read(key.data)

    def _read(self, host: _Host) -> None:
        try:
            chunk = os.read(host.output.fileno(), LONGEST_LINE_BYTES)
        except BlockingIOError:
            return
        self._write_log(host, chunk)
        lines = host.lines(chunk)
        if not chunk:
            self._selector.unregister(host.output)
            self._open.discard(host.index)
            lines = [host.partial] if host.partial else []
            host.partial = b""
        for line in lines:
            self._observer.line(host.name, line.rstrip(b"\r").decode("utf-8", "replace"))

    def _write_log(self, host: _Host, chunk: bytes) -> None:
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
            host.signal_group(signal.SIGKILL)  # what the leader started and left behind
            exits.append(supervise.Exit(host.index, host.process.wait(timeout=REAP_S)))
            self._warden.release(host.pid)
            del self._hosts[host.index]
            self._ended.append(host)
        known = self._state.cause
        transition = supervise.on_exits(self._state, exits)
        cause = transition[0].cause
        if known is None and cause is not None:
            others = f"; ending {len(self._hosts)} others" if self._hosts else ""
            self._observer.note(f"host-{cause.index} {cause.describe()}{others}")
        self._carry_out(transition)

    def _listen(self) -> None:
        """Hear the hosts' heartbeats: how far each is, and whether one has fallen silent."""
        silent_s = self._heartbeats.listen(time.monotonic())
        self._state = replace(self._state, steps=dict(self._heartbeats.steps))
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
                    for index in processes & self._hosts.keys() if signum else ():
                        self._hosts[index].signal_group(signum)
                    killing = signum == signal.SIGKILL
                    self._kill_at = None if killing else time.monotonic() + grace_s
                    self._give_up_at = time.monotonic() + REAP_S if killing else None
                case supervise.Restart() | supervise.Finish():
                    self._end = effect

    def _kill_the_overdue(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            for host in self._hosts.values():
                self._observer.note(f"{host.name} (pid {host.pid}) did not end in time: SIGKILL")
                host.signal_group(signal.SIGKILL)
            self._kill_at, self._give_up_at = None, now + REAP_S
        if self._give_up_at is not None and now >= self._give_up_at:
            stuck = ", ".join(f"{host.name} (pid {host.pid})" for host in self._hosts.values())
            raise LaunchError(f"{stuck}: still there {REAP_S:.0f} s after SIGKILL; its system call does not return")

    def _close(self) -> None:
        """Kill and reap whatever is left; reached with processes running only if something raised."""
        for host in self._hosts.values():
            host.signal_group(signal.SIGKILL)
        for host in self._hosts.values():
            # One that does not die stays with the warden, which kills once more after us.
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.process.wait(timeout=REAP_S)
                self._warden.release(host.pid)
        for host in (*self._hosts.values(), *self._ended):
            host.output.close()
            if host.log is not None:
                host.log.close()
        self._selector.close()
        self._heartbeats.close()
        self._port.close()

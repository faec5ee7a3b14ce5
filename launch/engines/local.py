"""Runs a job of N JAX processes on this machine and supervises it. Linux only.

One thread, one loop: output, exits and signals all arrive at one selector, so there is nothing to lock and nothing
waits without a bound. What people see is written by threads of `console`, as a reader may never read. What to do about
exits and signals is decided in `supervise`, and carried out here on the processes of `host_processes`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch import logs, plainfile, supervise
from launch.command import LaunchError as LaunchError  # raised by `run`, so part of what this module offers
from launch.console import Console
from launch.contract import RUN_ROOT, STEP_BACK, JobContract
from launch.host_processes import HostProcesses
from launch.hosts import REAP_S, Orphans, Warden
from launch.interrupts import OperatorSignals
from launch.prefetching import Prefetching
from launch.tiers import HostTiers, TierOptions
from launch.timeline import Timeline
from orchestrator.rules.stalls import Sign

DRAIN_S = 1.0  # for output still in the pipes after the last process has ended
PATIENCE_S = 2.0  # for whoever reads our output, after the job's end


@dataclass(frozen=True)
class LocalJob:
    """What to run. `environ` is added to this process's own; `log_dir` gets `restart-R/host-I.log`, below
    `run-2` and so on if an earlier run has left its logs there. `hosts_file` (one
    host a line) is read before a restart of an elastic job, for at most `wait_for_hosts_s` until enough are there.
    `tiers`: each host has a memory tier of its own."""

    command: Sequence[str]
    processes: int
    devices_per_process: int = 1
    processes_after_restart: int | None = None
    log_dir: Path | None = None
    hosts_file: Path | None = None
    wait_for_hosts_s: float = 60.0
    environ: Mapping[str, str] = field(default_factory=dict)
    policy: supervise.RestartPolicy = field(default_factory=supervise.RestartPolicy)
    tiers: TierOptions | None = None

    def validate(self) -> None:
        """Raises: LaunchError with one line, if this job cannot be started."""
        for name, value, minimum in (
            ("processes", self.processes, 1),
            ("devices_per_process", self.devices_per_process, 1),
            ("processes_after_restart", self.processes_after_restart, 1),
            ("max_restarts", self.policy.max_restarts, 0),
        ):
            if value is not None and value < minimum:
                raise LaunchError(f"--{name}={value}: expected at least {minimum}")
        if self.policy.elastic and not 1 <= self.policy.elastic[0] <= self.processes <= self.policy.elastic[1]:
            least, most = self.policy.elastic
            raise LaunchError(f"--elastic={least}:{most}: expected 1 <= MIN <= --processes ({self.processes}) <= MAX")
        if self.tiers is not None:
            self.tiers.validate(self.processes)
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
    """Who is informed about the job; every call comes on the thread that called `run`, and must return soon.

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
    environ = {**os.environ, **job.environ}
    with (
        OperatorSignals() as signals,
        Orphans(sole) as orphans,
        Warden() as warden,
        HostTiers(job.tiers, job.processes, environ, warden, orphans, observer.note) as tiers,
    ):
        for number in sorted(signals.ignored - {signal.SIGHUP}):
            observer.note(f"{supervise.signal_name(number)} is ignored, as it was in whatever started this")
        folder = None if job.log_dir is None else logs.claim(job.log_dir)
        if folder != job.log_dir:
            observer.note(f"logs go to {folder}: an earlier run has left its own in {job.log_dir}")
        timeline = Timeline(folder)
        history = supervise.JobHistory(job.processes)
        while True:
            with (
                contextlib.closing(_hold_loopback_port()) as port,
                HostProcesses(signals, orphans, warden, observer.line, observer.note) as processes,
                Prefetching(environ.get(RUN_ROOT), warden, orphans) as prefetching,
            ):
                incarnation = _Incarnation(job, observer, signals, processes, tiers, prefetching, timeline, history)
                incarnation.start(port.getsockname()[1], folder)
                end = incarnation.watch()
            if isinstance(end, supervise.Finish):
                if end.about:
                    observer.note(end.about)
                return end.code
            for line in end.history.notices:
                observer.note(line)
            hosts = _hosts_there(job, end.history, signals.wait)
            history = end.history if hosts is None else replace(end.history, hosts=hosts)
            signum = signals.wait(0.0)
            if hosts is not None and signum is None:
                observer.note(
                    f"restart {history.restarts} on {history.hosts} hosts in {history.delay_s:g} s "
                    f"({history.failures} of {job.policy.max_restarts} failures, {history.preemptions} preemptions)"
                )
                signum = signals.wait(history.delay_s)
            if hosts is None or signum is not None:
                end = supervise.stopped_between(history)
                observer.note(end.about)
                return end.code


def _hosts_there(job: LocalJob, history: supervise.JobHistory, wait: Callable[[float], int | None]) -> int | None:
    """Hosts for the next incarnation; None if the operator stops the job meanwhile, which `wait(seconds)` says.

    Raises: LaunchError if the hosts file does not list enough of them in time.
    """
    if history.restarts == 1 and job.processes_after_restart:
        return job.processes_after_restart
    if job.policy.elastic is None:
        return history.hosts
    least, most = job.policy.elastic
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
    """One start of the job, supervised from the first process to the end of the last."""

    def __init__(
        self,
        job: LocalJob,
        observer: Observer,
        signals: OperatorSignals,
        processes: HostProcesses,
        tiers: HostTiers,
        prefetching: Prefetching,
        timeline: Timeline,
        history: supervise.JobHistory,
    ) -> None:
        self._job, self._observer, self._signals, self._processes = job, observer, signals, processes
        self._tiers, self._prefetching, self._timeline = tiers, prefetching, timeline
        self._history = history
        self._state = supervise.State(job.policy, frozenset(range(history.hosts)), history)
        self._kill_at: float | None = None
        self._frozen: set[int] = set()  # hosts that were named as such
        self._give_up_at: float | None = None
        self._end: supervise.Restart | supervise.Finish | None = None

    def start(self, port: int, folder: Path | None) -> None:
        """Start all hosts; they meet at `port` and log below `folder`. Raises LaunchError."""
        logs = None
        if folder is not None:
            logs = folder / f"restart-{self._history.restarts}"
            try:
                logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LaunchError(f"--log_dir {self._job.log_dir}: {error.strerror}") from error
        environ = dict(self._job.environ)
        if self._history.step_back:
            environ[STEP_BACK] = str(self._history.step_back)
        self._record("started", hosts=self._history.hosts)
        for machine, pid in self._tiers.start(self._history.hosts, folder).items():
            self._record("server", machine=machine, pid=pid)
        for index in range(self._history.hosts):
            contract = JobContract(
                coordinator_address=f"127.0.0.1:{port}",
                process_count=self._history.hosts,
                process_index=index,
                local_devices=self._job.devices_per_process,
                restart_count=self._history.restarts,
                host_name=f"host-{index}",
                grace_period_s=self._job.policy.stop_grace_s / 2 or None,  # the other half is for leaving
            )
            own = environ | self._tiers.environ(index)
            self._processes.start(self._job.command, own, contract, logs)
            if self._tiers.may_hold(self._history.restarts):
                self._prefetching.start(index, own | contract.to_environment())

    def _note_prefetched(self) -> None:
        for one in self._prefetching.ended():
            self._observer.note(one.describe())
            self._record("prefetch", host=one.host, code=one.code, seconds=round(one.seconds, 3), found=one.found)

    def _record(self, event: str, **fields: object) -> None:
        self._timeline.record(event, restart=self._history.restarts, **fields)

    def watch(self) -> supervise.Restart | supervise.Finish:
        """Wait for the end, carrying out the supervisor's rules meanwhile."""
        while self._end is None:
            # A reader of ours that is behind is given time, but not by hosts that are to end.
            hold = self._observer.behind() and self._kill_at is None and self._processes.running
            self._processes.wait(0.1, read=not hold)
            for signum in self._signals.received():
                transition = supervise.on_signal(self._state, signum)
                self._observer.note(supervise.describe_signal(signum, transition[1]))
                self._carry_out(transition)
            self._reap()
            self._check_heartbeats()
            self._kill_the_overdue()
            self._tiers.watch()
            self._note_prefetched()
            running = self._processes.running.values()
            self._observer.tick([HostView(host.index, host.name, host.pid, self._history.restarts) for host in running])
        self._record("ended")
        give_up = time.monotonic() + DRAIN_S
        while self._processes.output_is_open and time.monotonic() < give_up:
            self._processes.wait(0.05)
            self._signals.received()
        return self._end

    def _reap(self) -> None:
        known = self._state.cause
        exits = self._processes.reap(one_may_have_ended_another=known is None)
        if exits:
            self._poll_heartbeats()  # the newest, before the exits are judged
            lost = self._tiers.ended(exits)
            for exit_ in exits:
                self._record("exit", host=exit_.index, code=exit_.code, lost=exit_.index in lost)
        transition = supervise.on_exits(self._state, exits)
        cause = transition[0].cause
        if known is None and cause is not None:
            count = len(self._processes.running)
            others = f"; ending {count} others" if count else ""
            self._observer.note(f"host-{cause.index} {cause.describe()}{others}")
        self._carry_out(transition)

    def _poll_heartbeats(self) -> dict[int, Sign]:
        """The hosts' signs of life; and from now on the supervisor knows how far each one is."""
        heartbeats = self._processes.heartbeats
        signs = heartbeats.signs(time.monotonic())
        self._state = replace(self._state, steps=dict(heartbeats.steps), heard=frozenset(signs))
        return signs

    def _check_heartbeats(self) -> None:
        """Whether a host has fallen silent."""
        signs = self._poll_heartbeats()
        self._name_frozen({index for index, sign in signs.items() if sign.frozen and index in self._processes.running})
        hung_before = self._state.hung
        transition = supervise.on_silence(self._state, signs)
        for index in sorted(transition[0].hung - hung_before):
            doing = self._processes.heartbeats.doing.get(index, "?")
            pulse = ", without a pulse" if signs[index].frozen else ""
            idle_s = signs[index].idle_s
            self._observer.note(f"host-{index} hangs{pulse}: silent for {idle_s:.0f} s, last heard {doing}: SIGKILL")
        self._carry_out(transition)

    def _name_frozen(self, frozen: set[int]) -> None:
        for index in sorted(frozen - self._frozen):
            limit_s = self._state.policy.hang_after_s
            then = f"; it is ended after {limit_s:.0f} s" if limit_s else ""
            self._observer.note(f"host-{index} has no pulse: the process is frozen{then}")
        for index in sorted((self._frozen - frozen) & self._processes.running.keys()):
            self._observer.note(f"host-{index} has a pulse again")
        self._frozen = frozen

    def _carry_out(self, transition: tuple[supervise.State, tuple[supervise.Effect, ...]]) -> None:
        self._state, effects = transition
        for effect in effects:
            match effect:
                case supervise.SendSignal(processes, signum, grace_s):
                    if signum:
                        self._processes.signal(processes, signum)
                    killing = signum == signal.SIGKILL
                    self._kill_at = None if killing else time.monotonic() + grace_s
                    self._give_up_at = time.monotonic() + REAP_S if killing else None
                case supervise.Restart() | supervise.Finish():
                    self._end = effect

    def _kill_the_overdue(self) -> None:
        now, running = time.monotonic(), self._processes.running
        if self._kill_at is not None and now >= self._kill_at:
            for host in running.values():
                self._observer.note(f"{host.name} (pid {host.pid}) did not end in time: SIGKILL")
            self._processes.signal(running, signal.SIGKILL)
            self._kill_at, self._give_up_at = None, now + REAP_S
        if self._give_up_at is not None and now >= self._give_up_at:
            stuck = ", ".join(f"{host.name} (pid {host.pid})" for host in running.values())
            raise LaunchError(f"{stuck}: still there {REAP_S:.0f} s after SIGKILL; its system call does not return")

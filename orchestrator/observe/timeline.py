"""What happened in a run, out of its event log: each host's state now, each save on each host, restores, incarnations.

Events are added one by one, so that a live view and a report of the whole run share the rules. Reads no files
and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.observe import own_process
from orchestrator.observe.event_log import LoggedEvent
from orchestrator.observe.events import (
    PHASES,
    Alive,
    Closed,
    EpochOpened,
    Pulse,
    SaveCommitted,
    SaveNotCommitted,
    SavePhase,
    SaveStarted,
    SteppedDown,
    StepRestored,
)
from orchestrator.observe.progress import Progress
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.stalls import Sign


@dataclass
class HostSave:
    """One save on one process. `began`: that host's clock. `phases`: when each began, in seconds after `began`.
    `ended_s`: None while it is under way, or if the process died. `outcome`: committed, the cause of an end without a
    commit, or ''."""

    step: int
    attempt: str
    process: int
    host: str
    began: float
    phases: dict[str, float] = field(default_factory=dict)
    written_bytes: int = 0
    blocked_s: float = 0.0
    ended_s: float | None = None
    outcome: str = ""
    reason: str = ""

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.step, self.attempt)

    def seconds(self, phase: str) -> float:
        """How long a phase took; 0 if it was not entered, up to the last event if it has not ended."""
        begun = self.phases.get(phase)
        if begun is None:
            return 0.0
        later = [self.phases[name] for name in PHASES[PHASES.index(phase) + 1 :] if name in self.phases]
        end = min(later, default=self.ended_s if self.ended_s is not None else max(self.phases.values()))
        return max(0.0, end - begun)


@dataclass
class HostState:
    """One process of the newest incarnation, as its events last showed it. `last_seen`, `since`, `moved`: by its own
    clock. `moved`: when its main thread last reported anything. `pulse`: the newest; None from an older version."""

    process: int
    host: str
    machine: str
    doing: str
    since: float
    last_seen: float
    step: int = -1
    written_bytes: int = 0
    rate: float | None = None
    left: bool = False
    moved: float = 0.0
    training_step: int = -1
    pulse: Pulse | None = None

    def sign(self, age_s: float) -> Sign:
        """Its sign of life, where `age_s` have passed since its newest event. Asks the kernel, if it is on this
        machine."""
        pulse = self.pulse
        idle_s = self.last_seen - self.moved + age_s
        step = self.training_step if self.training_step >= 0 else None
        if pulse is None:
            return Sign(idle_s, None, step, left=self.left)
        process = own_process.state_of(pulse.process_id)
        # A barrier that it has left since is one that it moved in.
        barrier = pulse.barrier if self.last_seen - self.moved >= pulse.idle_s else ""
        return Sign(idle_s, age_s, step, pulse.steps, pulse.step_s, barrier, self.left, process)


@dataclass(frozen=True)
class HostRestore:
    """A restore on one process. `seconds`: whole; `array_s` of it, and `read_bytes`: reading arrays."""

    time: float
    epoch: int
    process: int
    machine: str
    step: int
    seconds: float
    array_s: float
    read_bytes: int


@dataclass
class Timeline:
    """`epoch`: the newest of any event. `hosts`: of that one, by process. `saves`: by (step, attempt, process), in
    order. `opened`: epoch -> (time, process count). `startup_s`: how long the newest known start took."""

    epoch: int = 0
    hosts: dict[int, HostState] = field(default_factory=dict)
    saves: dict[tuple[int, str, int], HostSave] = field(default_factory=dict)
    restores: list[HostRestore] = field(default_factory=list)
    opened: dict[int, tuple[float, int]] = field(default_factory=dict)
    stepped_down: list[LoggedEvent] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    startup_s: float = 0.0

    def add(self, lines: Iterable[LoggedEvent]) -> Timeline:
        """Add lines, in the order of their times. Returns itself."""
        for line in lines:
            self._add_one(line)
        return self

    def _add_one(self, line: LoggedEvent) -> None:
        host = self._host(line)
        self.progress.add(line)
        event = line.event
        match event:
            case EpochOpened():
                if line.process == 0:
                    self.opened[line.epoch] = (line.time, event.process_count)
            case Alive():
                # Who waits in a collective while a save goes on is not training; the save's own events say more.
                if host and host.doing not in PHASES:
                    _now(host, event.doing, line.time, event.step)
                if host:
                    _moved(host, line.time, event.step)
            case Pulse():
                self.startup_s = event.startup_s or self.startup_s
                if host and not host.left:
                    if host.doing not in PHASES:
                        _now(host, event.doing, line.time - event.since_s, event.step)
                    host.pulse = event
                    _moved(host, line.time - event.idle_s, event.step if event.steps else -1)
            case SavePhase():
                self._phase(line, event, host)
            case SaveStarted():
                if save := self.saves.get((event.step, event.attempt, line.process)):
                    save.blocked_s = event.blocked_s
            case SaveCommitted():
                self._end(line, event.step, event.attempt, "committed", "", event.elapsed_s, host)
            case SaveNotCommitted():
                self._end(line, event.step, event.attempt, event.cause, event.reason, None, host)
            case StepRestored():
                measured = (event.elapsed_s, event.array_s, event.read_bytes)
                where = (line.time, line.epoch, line.process, line.machine, event.step)
                self.restores.append(HostRestore(*where, *measured))
                if host:
                    _now(host, "restored", line.time, event.step)
            case SteppedDown():
                self.stepped_down.append(line)
            case Closed():
                if host:
                    _now(host, "left", line.time, host.step)
                    host.left = True

    def _host(self, line: LoggedEvent) -> HostState | None:
        """The host of a line of the newest incarnation; None for one of an older: it has no state any more."""
        if line.epoch < self.epoch:
            return None
        if line.epoch > self.epoch:
            self.epoch, self.hosts = line.epoch, {}
        host = self.hosts.get(line.process)
        if host is None:
            host = HostState(line.process, line.host, line.machine, "starting", line.time, line.time)
            if not isinstance(line.event, Pulse):
                host.moved = line.time
            self.hosts[line.process] = host
        host.last_seen = max(host.last_seen, line.time)
        return host

    def _phase(self, line: LoggedEvent, event: SavePhase, host: HostState | None) -> None:
        key = (event.step, event.attempt, line.process)
        save = self.saves.get(key)
        if save is None:
            began = line.time - event.elapsed_s
            save = self.saves[key] = HostSave(event.step, event.attempt, line.process, line.host, began)
        repeated = event.phase in save.phases
        save.phases.setdefault(event.phase, event.elapsed_s)
        save.written_bytes = max(save.written_bytes, event.written_bytes)
        if host:
            if not repeated:
                _now(host, event.phase, line.time, event.step)
            host.written_bytes = save.written_bytes
            writing_s = event.elapsed_s - save.phases.get("writing", event.elapsed_s)
            if event.phase in ("writing", "sealing") and writing_s > 0:
                host.rate = save.written_bytes / writing_s

    def _end(
        self,
        line: LoggedEvent,
        step: int,
        attempt: str,
        outcome: str,
        reason: str,
        elapsed_s: float | None,
        host: HostState | None,
    ) -> None:
        save = self.saves.get((step, attempt, line.process))
        if save is not None:
            save.outcome, save.reason = outcome, reason
            save.ended_s = line.time - save.began if elapsed_s is None else elapsed_s
        if host:
            _now(host, "training" if outcome == "committed" else f"training; {outcome}", line.time, step)


def _now(host: HostState, doing: str, time: float, step: int) -> None:
    if host.doing != doing:
        host.doing, host.since = doing, time
    if step >= 0:
        host.step = step


def _moved(host: HostState, time: float, step: int) -> None:
    host.moved, host.training_step = max(host.moved, time), max(host.training_step, step)

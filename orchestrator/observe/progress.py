"""How far training had come, and who was silent, as the events of each incarnation show it: what goodput, stalls and
incidents are read from. Memory grows with the time of the run, not with the number of hosts."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from orchestrator.observe.event_log import LoggedEvent
from orchestrator.observe.events import Alive, Closed, Pulse, SaveStarted
from orchestrator.rules.goodput import FLOOR_S, Mark

_SILENCES_MAX = 5000  # the longest are kept
_APART_S = 1.0  # marks of a new step that come faster than this say nothing more


@dataclass(frozen=True, order=True)
class Silence:
    """A host without any event for longer than FLOOR_S, between two of its events."""

    seconds: float
    began: float
    epoch: int
    process: int
    host: str


@dataclass
class EpochProgress:
    """One incarnation. `last_seen`: process -> (host, its newest event). `heard_from`: process -> its first pulse, or
    its first event if it has no pulses: before that nothing is known of it, as old pulses go, or were not read.
    `closed`: processes that left in order."""

    epoch: int
    first: float
    last: float
    marks: list[Mark] = field(default_factory=list)
    last_seen: dict[int, tuple[str, float]] = field(default_factory=dict)
    heard_from: dict[int, float] = field(default_factory=dict)
    pulsing: set[int] = field(default_factory=set)
    closed: set[int] = field(default_factory=set)

    @property
    def in_order(self) -> bool:
        """Every process of which there are events has closed."""
        return bool(self.closed) and self.closed >= set(self.last_seen)


@dataclass
class Progress:
    """`epochs`: by number. `silences`: the longest of all hosts, in no order."""

    epochs: dict[int, EpochProgress] = field(default_factory=dict)
    silences: list[Silence] = field(default_factory=list)

    def add(self, line: LoggedEvent) -> None:
        """Lines come in the order of their times."""
        one = self.epochs.setdefault(line.epoch, EpochProgress(line.epoch, line.time, line.time))
        one.last = max(one.last, line.time)
        _, before = one.last_seen.get(line.process, ("", line.time))
        if line.time - before > FLOOR_S:
            silence = Silence(line.time - before, before, line.epoch, line.process, line.host)
            if len(self.silences) < _SILENCES_MAX:
                heapq.heappush(self.silences, silence)
            else:
                heapq.heappushpop(self.silences, silence)
        one.last_seen[line.process] = (line.host, max(before, line.time))
        one.heard_from.setdefault(line.process, line.time)
        match line.event:
            case Pulse() if line.process not in one.pulsing:
                one.pulsing.add(line.process)
                one.heard_from[line.process] = line.time
            case Alive(doing="training", step=step) | SaveStarted(step=step) if step >= 0:
                newest = one.marks[-1] if one.marks else None
                if newest is None or step > newest.step or line.time - newest.time >= _APART_S:
                    one.marks.append(Mark(line.time, max(step, newest.step if newest else -1)))
            case Closed():
                one.closed.add(line.process)

    def silent(self, epoch: int, began: float, ended: float) -> list[Silence] | None:
        """Of an incarnation those who were silent nearly as long as [began, ended], by process; [] if all were; None
        if too little is known of that time."""
        one_epoch = self.epochs.get(epoch)
        known = one_epoch.last_seen if one_epoch else {}
        everyone = {
            process: seen
            for process, seen in known.items()
            if one_epoch and one_epoch.heard_from[process] <= began + FLOOR_S
        }
        found = {
            one.process: one
            for one in self.silences
            if one.epoch == epoch
            and one.process in everyone
            and min(ended, one.began + one.seconds) - max(began, one.began) > 0.7 * (ended - began)
        }
        for process, (host, at) in everyone.items():  # a silence that has not ended lies between no two events
            if one_epoch and process not in one_epoch.closed and ended - max(began, at) > 0.7 * (ended - began):
                found.setdefault(process, Silence(ended - at, at, epoch, process, host))
        if len(everyone) < len(known) and len(found) in (0, len(everyone)):
            return None
        return [found[process] for process in sorted(found)] if len(found) < len(everyone) else []

"""When training stands still, and who holds a job up, out of the hosts' signs of life. Pure.

In a job that computes together one main thread that stops stops them all. What tells them apart: the pulse of a thread
beside it (none: the process is frozen or dead), the barrier that a main thread waits in, and the step it has reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

NO_PULSE_S = 15.0  # three pulses
NOW, SOON, BEFORE = (30.0, 10), (5.0, 3), (10.0, 5)  # seconds, and usual times: see `standstill_s`
STARTING_FACTOR = 4  # a first step, which compiles, may take so many times as long as any other
_GIVE_UP_FACTOR = 1.5  # of the limit: whoever stands so long is ended, whoever may be to blame


def standstill_s(usual_s: float, sure: tuple[float, int]) -> float:
    """How long without a sign of progress is a standstill, where one usually comes every `usual_s`. `sure`: NOW, while
    it may yet go on; SOON, where it is known who holds the others up; BEFORE, seen afterwards, when it has gone on."""
    least_s, times = sure
    return max(least_s, times * usual_s)


class Condition(StrEnum):
    """STARTING: the first step is not done: it compiles. WAITING: stands, for somebody else. STUCK: stands, and nobody
    else is known to hold it up. FROZEN: no pulse: frozen, or dead. DEAD: its process is known to be gone. LEFT: closed
    in order."""

    MOVING = "moving"
    STARTING = "starting"
    WAITING = "waiting"
    STUCK = "stuck"
    FROZEN = "frozen"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True)
class Sign:
    """What is known of one host now. `pulse_age_s`: since its newest pulse; None: it has none (an older version).
    `idle_s`: for how long its main thread has reported nothing. `steps`: of training since the start, None if it does
    not say. `process`: what the kernel of its machine says, where that can be asked. Ages, never times: the hosts'
    clocks differ."""

    idle_s: float
    pulse_age_s: float | None = None
    step: int | None = None
    steps: int | None = None
    step_s: float = 0.0
    barrier: str = ""
    left: bool = False
    process: Literal["", "here", "stopped", "ended"] = ""

    @property
    def starting(self) -> bool:
        return self.steps is not None and self.steps < 2

    @property
    def dead(self) -> bool:
        return not self.left and self.process == "ended"

    @property
    def frozen(self) -> bool:
        silent = self.pulse_age_s is not None and self.pulse_age_s > NO_PULSE_S
        return not self.left and not self.dead and (silent or self.process == "stopped")

    def stands(self, somebody_is_frozen: bool) -> bool:
        return self.idle_s > standstill_s(self.step_s, SOON if somebody_is_frozen else NOW)


@dataclass(frozen=True)
class Diagnosis:
    """`waits_for`: the hosts that hold this one up, as far as they are known. `stopped`: it is known why a frozen one
    is: a signal, or a debugger, has stopped it."""

    condition: Condition
    waits_for: tuple[int, ...] = ()
    stopped: bool = False


def diagnose(signs: Mapping[int, Sign]) -> dict[int, Diagnosis]:
    """The condition of each host, by process."""
    lost = tuple(sorted(process for process, sign in signs.items() if sign.frozen or sign.dead))
    found: dict[int, Diagnosis] = {}
    standing: dict[int, Sign] = {}
    for process, sign in signs.items():
        if sign.left:
            found[process] = Diagnosis(Condition.LEFT)
        elif sign.dead:
            found[process] = Diagnosis(Condition.DEAD)
        elif sign.frozen:
            found[process] = Diagnosis(Condition.FROZEN, stopped=sign.process == "stopped")
        elif sign.starting and not sign.barrier:
            found[process] = Diagnosis(Condition.STARTING, lost)
        elif not sign.stands(bool(lost)):
            found[process] = Diagnosis(Condition.STARTING if sign.starting else Condition.MOVING)
        else:
            standing[process] = sign
    blamed = lost or _blamed(signs, standing)
    for process in standing:
        stuck = process in blamed or not blamed
        found[process] = Diagnosis(Condition.STUCK) if stuck else Diagnosis(Condition.WAITING, blamed)
    return dict(sorted(found.items()))


def _blamed(signs: Mapping[int, Sign], standing: Mapping[int, Sign]) -> tuple[int, ...]:
    """Who holds up those that stand, where all have a pulse: () if that cannot be seen."""
    barriers = {sign.barrier for sign in standing.values() if sign.barrier}
    here = {process: sign for process, sign in signs.items() if not sign.left}
    if barriers:  # whoever has not come to it
        return tuple(sorted(process for process, sign in here.items() if not sign.barrier))
    reached = {process: sign.step for process, sign in standing.items() if sign.step is not None}
    least = min(reached.values(), default=None)
    behind = tuple(sorted(process for process, step in reached.items() if step == least))
    return behind if len(behind) < len(standing) else ()


def hung(signs: Mapping[int, Sign], limit_s: float) -> frozenset[int]:
    """The hosts to end because they hang: their main thread has reported nothing for longer than `limit_s`, and it is
    they who hold the others up. Never those that only wait, unless nothing else can be seen, or for half as long again.
    """
    overdue = {
        process
        for process, sign in signs.items()
        if not sign.left
        and sign.idle_s > limit_s * (STARTING_FACTOR if sign.starting and not sign.frozen and not sign.barrier else 1)
    }
    if not overdue:
        return frozenset()
    conditions = {process: each.condition for process, each in diagnose(signs).items()}
    lost = {process for process in signs if conditions[process] in (Condition.FROZEN, Condition.DEAD)}
    blamed = lost or {process for process in signs if conditions[process] is Condition.STUCK}
    given_up = {process for process in overdue if signs[process].idle_s > _GIVE_UP_FACTOR * limit_s}
    if not blamed:
        return frozenset(overdue)
    return frozenset(blamed & overdue) or frozenset(given_up - _only_starting(signs, given_up))


def hung_alone(sign: Sign, limit_s: float) -> bool:
    """As `hung`, of a host of which alone anything is known: where it has a pulse and stands, it may be waiting for
    another, who is to be ended first."""
    factor = STARTING_FACTOR if sign.starting and not sign.barrier else _GIVE_UP_FACTOR
    pulse = sign.pulse_age_s is not None and not sign.frozen
    return not sign.left and sign.idle_s > limit_s * (factor if pulse else 1)


def _only_starting(signs: Mapping[int, Sign], processes: set[int]) -> set[int]:
    return {process for process in processes if signs[process].starting}

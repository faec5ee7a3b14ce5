"""The verdict of `orchestrator watch`: one word for a run, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.cli import render
from orchestrator.rules.stalls import Condition, Diagnosis

Verdict = Literal["HEALTHY", "STARTING", "SAVING", "STALLED", "NO COMMITS", "ENDED"]
FINE: tuple[Verdict, ...] = ("HEALTHY", "SAVING", "ENDED")
TONES: dict[Verdict, render.Tone] = {
    **dict.fromkeys(FINE, "good"),
    "STARTING": "warn",
    "STALLED": "bad",
    "NO COMMITS": "bad",
}
_LATE = 3  # intervals without a commit
_LATE_S = 3600.0  # where no interval is known
_NAMED = 4
_ROOM_LEAST = 1 << 16  # bytes: less is no room for a record


@dataclass(frozen=True)
class Facts:
    """What a verdict goes by. `conditions`, `hosts`: by process, of the newest incarnation; {} if there are no events.
    `waits_at`: a barrier that somebody waits in, or ''. `processes`: expected; None if not known. `commit_age_s`: since
    the newest commit or, before the first one, since the run was opened. `interval_s`: usual time between two.
    `failed`: saves in a row without a commit, up to now; `why_failed`: the last one's reason. `free_bytes`: where the
    run is, None where that cannot be asked."""

    conditions: Mapping[int, Diagnosis] = field(default_factory=dict)
    hosts: Mapping[int, str] = field(default_factory=dict)
    waits_at: str = ""
    processes: int | None = None
    saving: int | None = None
    step: int | None = None
    step_s: float = 0.0
    commit_age_s: float | None = None
    interval_s: float | None = None
    failed: int = 0
    why_failed: str = ""
    free_bytes: int | None = None


def judge(facts: Facts) -> tuple[Verdict, str]:
    """The worst that is true."""
    return _without_events(facts) or _at_rest(facts) or _full(facts) or _starting(facts) or _working(facts)


def _full(facts: Facts) -> tuple[Verdict, str] | None:
    """Where nothing more can be written, events end, too: what they last said is no news."""
    if facts.free_bytes is None or facts.free_bytes >= _ROOM_LEAST:
        return None
    age = "" if facts.commit_age_s is None else f"; the last commit was {render.duration(facts.commit_age_s)} ago"
    return "NO COMMITS", f"the disk is full ({render.size(facts.free_bytes)} free): nothing can be saved{age}"


def _without_events(facts: Facts) -> tuple[Verdict, str] | None:
    if facts.conditions:
        return None
    if facts.commit_age_s is None:
        return "STARTING", "no step and no events of this epoch yet"
    age = render.duration(facts.commit_age_s)
    if _late(facts):
        return "NO COMMITS", f"the last one was {age} ago, and there are no events that say why"
    return "HEALTHY", f"the last commit was {age} ago; there are no events of its hosts"


def _at_rest(facts: Facts) -> tuple[Verdict, str] | None:
    here = {process: each for process, each in facts.conditions.items() if each.condition is not Condition.LEFT}
    if not here:
        left = len(facts.conditions)
        if facts.processes is not None and left < facts.processes:
            return "STALLED", f"{left} of {facts.processes} processes have left, nothing was heard of the others"
        return "ENDED", f"all {left} processes closed in order" if left > 1 else "the process closed in order"
    if lost := _lost(facts, here):
        return "STALLED", lost
    stuck = [process for process, each in here.items() if each.condition is Condition.STUCK]
    waiting = [each for each in here.values() if each.condition is Condition.WAITING]
    at = f" at `{facts.waits_at}`" if facts.waits_at else ""
    if stuck and waiting:
        return "STALLED", f"{_named(facts, stuck)} does not go on; {len(waiting)} more wait for it{at}"
    if stuck:
        return "STALLED", f"no host goes on{at}, and none is behind the others: a device or a collective hangs"
    causes = {process for each in waiting for process in each.waits_for}
    if waiting and not all(here[process].condition is Condition.STARTING for process in causes & here.keys()):
        return "STALLED", f"{len(waiting)} hosts wait for {_named(facts, sorted(causes))}{at}"
    return None


def _lost(facts: Facts, here: Mapping[int, Diagnosis]) -> str:
    """Of those without a pulse, or without a process, what is known; '' if there is none."""
    dead = [process for process, each in here.items() if each.condition is Condition.DEAD]
    frozen = {process: each for process, each in here.items() if each.condition is Condition.FROZEN}
    stopped = [process for process, each in frozen.items() if each.stopped]
    silent = [process for process in frozen if process not in stopped]
    count = len(dead) + len(frozen)
    waiting = sum(each.condition is Condition.WAITING for each in here.values())
    if count == len(here) > 0:
        whole = "the job" if count > 1 else "the process"
        if dead and not frozen:
            return f"{whole} is gone: it did not close, and no process of it is left"
        if not dead and not silent:
            return f"{whole} is frozen: a signal has stopped every process of it"
        return f"no host has a pulse: {whole} is gone, or frozen as a whole"
    said = [
        f"{_named(facts, dead)} {_is(dead)} dead: no such process any more" if dead else "",
        f"{_named(facts, stopped)} {_is(stopped)} frozen: stopped by a signal" if stopped else "",
        f"{_named(facts, silent)} {'has' if len(silent) == 1 else 'have'} no pulse: frozen or dead" if silent else "",
        f"{waiting} more wait" if count and waiting else "",  # the others have not come to where they need it
    ]
    return "; ".join(filter(None, said))


def _is(processes: Sized) -> str:
    return "is" if len(processes) == 1 else "are"


def _starting(facts: Facts) -> tuple[Verdict, str] | None:
    missing = sorted(set(range(facts.processes or 0)) - facts.conditions.keys())
    if missing:
        numbers = ", ".join(map(str, missing[:_NAMED])) + (" ..." if len(missing) > _NAMED else "")
        return "STARTING", f"not heard of: process{'es' if len(missing) > 1 else ''} {numbers}"
    count = sum(each.condition is Condition.STARTING for each in facts.conditions.values())
    return ("STARTING", f"the first step is not done on {count} hosts: it compiles") if count else None


def _working(facts: Facts) -> tuple[Verdict, str]:
    if facts.failed > 1 or (facts.failed and facts.commit_age_s is None):
        return "NO COMMITS", f"{facts.failed} saves in a row were not committed: {facts.why_failed}"
    if _late(facts):
        return "NO COMMITS", f"the last one was {render.duration(facts.commit_age_s or 0.0)} ago"
    rate = f", {render.duration(facts.step_s)} a step" if facts.step_s else ""
    at = f"training, step {facts.step}{rate}" if facts.step is not None else "training"
    if facts.saving is not None:
        return "SAVING", f"step {facts.saving}; {at}"
    return "HEALTHY", at


def _late(facts: Facts) -> bool:
    limit_s = _LATE_S if facts.interval_s is None else _LATE * max(facts.interval_s, 1.0)
    return facts.commit_age_s is not None and facts.commit_age_s > limit_s


def _named(facts: Facts, processes: Iterable[int]) -> str:
    named = [f"{facts.hosts.get(process, '?')} (process {process})" for process in processes]
    return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more" if len(named) > _NAMED else "")

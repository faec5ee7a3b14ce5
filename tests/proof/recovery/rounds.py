"""Which hosts are lost in which round, and what must come of it. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

HOSTS = 4
MOMENT_S = 3.0  # a host may be lost so long after the promise holds again
AGAIN_S = 6.0  # and so long after it was lost, once more
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A job. groups: what may be lost at once, by the promise."""

    name: str
    flags: tuple[str, ...]
    args: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]


SETTINGS = (
    Setting(
        "one copy, 2 racks of 2 hosts",
        ("--lose_tier_on_kill", "--domains=2"),
        ("hold=4", "save=100", "copies=1", "domain=rack"),
        ((0, 1), (2, 3)),
    ),
    Setting(
        "two copies, 4 hosts",
        ("--lose_tier_on_kill",),
        ("hold=4", "save=100", "copies=2", "domain=node"),
        ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)),
    ),
)


# Saves to the store often: outside the promise that is what is left.
OUTSIDE = Setting(
    "one copy, 2 racks, more lost", SETTINGS[0].flags, ("hold=4", "save=20", "copies=1", "domain=rack"), ()
)


@dataclass(frozen=True)
class Round:
    """lost: hosts that are killed, with their memory. crashed: others, whose process crashes at the same moment; their
    memory stays. again_s: so long after, the same hosts are lost once more. moment_s: after a step is held by all."""

    number: int
    setting: Setting
    kind: str
    lost: tuple[int, ...]
    crashed: tuple[int, ...]
    moment_s: float
    again_s: float | None = None
    within: bool = True


def within(seed: int, number: int, rounds: int) -> Round:
    """Round `number` of so many: the same seed makes the same."""
    dice = random.Random(f"{seed}/within/{number}")
    setting = SETTINGS[number * len(SETTINGS) // rounds]
    group = dice.choice(setting.groups)
    some = tuple(sorted(dice.sample(group, dice.randint(1, len(group)))))
    kind = dice.choice(("hosts lost", "hosts lost", "hosts lost, others crash", "processes crash", "lost twice"))
    others = [host for host in range(HOSTS) if host not in some]
    crashed = tuple(sorted(dice.sample(others, dice.randint(1, len(others)))))
    moment_s = dice.uniform(0, MOMENT_S)
    if kind == "processes crash":
        everyone = range(HOSTS)
        return Round(number, setting, kind, (), tuple(sorted(dice.sample(everyone, dice.randint(1, HOSTS)))), moment_s)
    if kind == "hosts lost, others crash":
        return Round(number, setting, kind, some, crashed, moment_s)
    return Round(number, setting, kind, some, (), moment_s, dice.uniform(0, AGAIN_S) if kind == "lost twice" else None)


def outside(seed: int, number: int) -> Round:
    """Three hosts of four, or all, with their memory: whatever the setting, some part has no copy left."""
    dice = random.Random(f"{seed}/outside/{number}")
    lost = tuple(sorted(dice.sample(range(HOSTS), dice.choice((3, 4)))))
    return Round(number, OUTSIDE, f"{len(lost)} of {HOSTS} lost", lost, (), dice.uniform(0, MOMENT_S), within=False)


@dataclass
class Verdict:
    """expected: the newest step that all survivors were told is held (outside the promise: that is committed).
    seconds: from the first kill to the first new step of the last process."""

    expected: int | None
    restored: int | None
    seconds: float
    sources: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def held_by_all(lines: Sequence[Line], survivors: Collection[int], restarts: range) -> int | None:
    """The newest step that each survivor was told is held, in the newest of these starts in which there is one."""
    for restart in reversed(restarts):
        told = {
            host: {
                line["step"]
                for line in lines
                if line["event"] == "StepHeld" and line["process"] == host and line["restart"] == restart
            }
            for host in survivors
        }
        if common := set.intersection(*told.values()):
            return int(max(common))
    return None


def newest_committed(lines: Sequence[Line]) -> int | None:
    return max((int(line["step"]) for line in lines if line["event"] == "SaveCommitted"), default=None)


def judge(one: Round, lines: Sequence[Line], killed: int, back: int, killed_s: float) -> Verdict:
    """lines: all that was said. killed: the start in which hosts were lost. back: the one that trains again."""
    before = [line for line in lines if line["restart"] < back]
    mine = [line for line in lines if line["restart"] == back]
    restored = {line["process"]: line for line in mine if line["event"] == "restored"}
    first_steps = {line["process"]: float(line["time"]) for line in reversed(mine) if line["event"] == "step"}
    survivors = [host for host in range(HOSTS) if host not in one.lost]
    expected = held_by_all(before, survivors, range(killed, back)) if one.within else newest_committed(before)
    steps = {line["step"] for line in restored.values()}
    step = int(next(iter(steps))) if len(steps) == 1 else None
    sources: dict[str, int] = {}
    for line in restored.values():
        for name, size in line["sources"].items():
            sources[name] = sources.get(name, 0) + size
    verdict = Verdict(expected, step, max(first_steps.values()) - killed_s, sources)
    if step is None:
        verdict.problems.append(f"hosts restored different steps: {sorted(steps)}")
    elif expected is None or step < expected:
        verdict.problems.append(f"restored step {step}, and step {expected} was there")
    if one.within and sources.get("store") and step != newest_committed(before):
        verdict.problems.append(f"{sources['store']} bytes of arrays from the store")
    if (
        not one.within
        and step is not None
        and not any(line["event"] in ("SaveCommitted", "step") and line["step"] == step for line in before)
    ):
        verdict.problems.append(f"restored step {step}, which nobody has trained")
    checked = [line for line in mine if line["event"] == "checked"]
    if len(checked) < HOSTS or not all(line["right"] for line in checked):
        verdict.problems.append(f"wrong bits: {[(line['process'], line['right']) for line in checked]}")
    return verdict

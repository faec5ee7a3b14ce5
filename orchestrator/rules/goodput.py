"""Where a run's time went: each second from the first start to the last sign of life has exactly one kind. Pure.

`training` alone is what the run is for. The others: `blocked` by saves, `stalled` (no step for several usual gaps),
`again` (steps that an earlier incarnation had already trained), `starting` (start-up, restore and the first step),
`down` (from the end of an incarnation that did not close to the next start), `idle` (after one that closed in order).

Times are seconds since 1970 by the clocks of several hosts; what overlaps is counted once.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from orchestrator.rules.stalls import BEFORE, standstill_s

FLOOR_S = standstill_s(0.0, BEFORE)  # no shorter gap is a stall

Span = tuple[float, float]
Kind = Literal["training", "blocked", "stalled", "again", "starting", "down", "idle"]


class Mark(NamedTuple):
    """Training had come to `step` at `time`. judged: it is known from events, so that a gap before it says something;
    a journal alone has nothing between two saves."""

    time: float
    step: int
    judged: bool = True


class Incarnation(NamedTuple):
    """What is known of one. `closed`: it ended in order. `blocked`: when training stood still for a save."""

    epoch: int
    first: float
    last: float
    closed: bool
    marks: Sequence[Mark] = ()
    blocked: Sequence[tuple[float, float]] = ()


class Stretch(NamedTuple):
    kind: Kind
    began: float
    ended: float
    epoch: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began


def split(incarnations: Iterable[Incarnation]) -> list[Stretch]:
    """The stretches of the run, in order and without gaps, from the first start to the last sign of life."""
    found: list[Stretch] = []
    reached = -1
    former: Incarnation | None = None
    for one, following in itertools.pairwise([*sorted(incarnations, key=lambda each: each.epoch), None]):
        assert one is not None
        # An older one may write on after the next has begun (a zombie): the time is the newer one's.
        last = max(one.first, one.last if following is None else min(one.last, following.first))
        one = one._replace(last=last)
        if former and one.first > former.last:
            found.append(Stretch("idle" if former.closed else "down", former.last, one.first, one.epoch))
        found += _of_one(one, reached)
        reached = max([reached, *(mark.step for mark in one.marks)])
        former = one
    return [stretch for stretch in found if stretch.seconds > 0]


def _of_one(one: Incarnation, reached: int) -> Iterator[Stretch]:
    marks = sorted(mark for mark in one.marks if one.first <= mark.time <= one.last)
    if not marks:
        yield Stretch("starting", one.first, one.last, one.epoch)
        return
    stalls = list(_stalls(marks, one.last, one.blocked))
    again_until = _passed(marks, reached, one.last)
    spans: list[tuple[Kind, float, float]] = [("blocked", *span) for span in one.blocked]
    spans += [("stalled", *span) for span in stalls]
    spans += [("starting", one.first, marks[0].time), ("again", marks[0].time, again_until)]
    for kind, began, ended in _painted(spans, one.first, one.last):
        yield Stretch(kind, began, ended, one.epoch)


def _painted(
    spans: Sequence[tuple[Kind, float, float]], first: float, last: float
) -> Iterator[tuple[Kind, float, float]]:
    """[first, last] cut into pieces: the first kind that covers one counts, else training."""
    rank: dict[Kind, int] = {"blocked": 0, "starting": 1, "stalled": 2, "again": 3, "training": 4}
    edges: list[tuple[float, int, Kind]] = []
    for kind, began, ended in spans:
        began, ended = max(began, first), min(ended, last)
        if ended > began:
            edges += [(began, 1, kind), (ended, -1, kind)]
    edges.sort(key=lambda edge: edge[0])
    covering: dict[Kind, int] = dict.fromkeys(rank, 0)
    at, now = first, "training"
    for time, change, kind in [*edges, (last, 0, "training")]:
        covering[kind] += change
        following = min(
            (each for each, count in covering.items() if count > 0), key=rank.__getitem__, default="training"
        )
        if following != now or change == 0:
            if time > at:
                yield now, at, time  # type: ignore[misc]
            at, now = time, following


def _stalls(
    marks: Sequence[Mark], last: float, blocked: Sequence[tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """Gaps between marks, and after the last one, that neither a save nor the number of steps explains."""
    ends = [*itertools.pairwise(marks), (marks[-1], Mark(last, marks[-1].step))]
    judged = [(a, b) for a, b in ends if a.judged and b.judged]
    gaps = [b.time - a.time for a, b in judged[:-1] if b.time > a.time] or [0.0]
    rates = [(b.time - a.time) / (b.step - a.step) for a, b in judged[:-1] if b.step > a.step] or [0.0]
    usual_s, step_s = statistics.median(gaps), statistics.median(rates)
    saves = sorted(blocked)
    first = 0  # of the saves that may lie in this gap or a later one
    for a, b in judged:
        if b.time - a.time <= FLOOR_S:
            continue
        while first < len(saves) and saves[first][1] <= a.time:
            first += 1
        inside = itertools.takewhile(lambda save, b=b: save[0] < b.time, itertools.islice(saves, first, None))  # type: ignore[misc]
        saving_s = sum(max(0.0, min(end, b.time) - max(begin, a.time)) for begin, end in inside)
        expected_s = max(usual_s, step_s * max(0, b.step - a.step))
        if b.time - a.time - saving_s > standstill_s(expected_s, BEFORE):
            yield a.time + expected_s, b.time


def _passed(marks: Sequence[Mark], reached: int, last: float) -> float:
    """When training had done all that it had done before, up to step `reached`: between two marks in proportion."""
    before = marks[0]
    for mark in marks:
        if mark.step > reached:
            if mark.step <= before.step or before.step >= reached:
                return before.time
            return before.time + (mark.time - before.time) * (reached - before.step) / (mark.step - before.step)
        before = mark
    return last


def seconds(stretches: Iterable[Stretch]) -> dict[Kind, float]:
    """Kind -> seconds, all kinds."""
    total: dict[Kind, list[float]] = {
        kind: [] for kind in ("training", "blocked", "stalled", "again", "starting", "down", "idle")
    }
    for stretch in stretches:
        total[stretch.kind].append(stretch.seconds)
    return {kind: math.fsum(parts) for kind, parts in total.items()}

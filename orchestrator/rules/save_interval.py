"""How often to save: the interval that loses least to saves and to failures, with the reason for it. Pure.

A save costs the time for which training stands still; a failure costs what was trained since the last commit. Young
(1974) balances the two, Daly (2006, https://doi.org/10.1016/j.future.2004.11.016) is exact where failures are frequent.
How often the job fails is read from the journal: each epoch after the first is an interruption.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from orchestrator.rules.records import Head

PRIOR_S = 24 * 3600.0  # before it has failed, a job is taken to run for a day; the weight of one interruption
_EPOCHS_MAX = 16  # how far back the journal is read
_LEAST_S = 1e-3  # of any cost: one too small to be measured is not free


@dataclass(frozen=True)
class History:
    """interruptions: epochs that followed another one. running_s: time that the epochs ran, from the opening to the
    last entry of each. downtime_s: median from an epoch's last entry to the next one's opening."""

    interruptions: int = 0
    running_s: float = 0.0
    downtime_s: float = 0.0


@dataclass(frozen=True)
class Costs:
    """What this run has measured. blocked_s: training stands still for a save, on the slowest host. durable_s: from
    the start of a save to its commit. restart_s: from a failure to the next epoch."""

    blocked_s: float
    durable_s: float
    restart_s: float
    interruptions: int
    running_s: float

    @property
    def mtbf_s(self) -> float:
        """Expected time between interruptions: the observed ones, plus one in PRIOR_S."""
        return (self.running_s + PRIOR_S) / (self.interruptions + 1)


@dataclass(frozen=True)
class Cadence:
    """A chosen interval. goodput: expected share of the time that goes into training which is not done twice."""

    interval_s: float
    goodput: float
    because: str
    costs: Costs

    def __repr__(self) -> str:
        return f"<Cadence: every {self.interval_s:.3g} s, goodput {self.goodput:.1%}; {self.because}>"


def optimal_interval_s(blocked_s: float, mtbf_s: float) -> float:
    """Daly's interval between saves."""
    cost, mean = max(blocked_s, _LEAST_S), mtbf_s
    if cost >= 2 * mean:
        return mean
    ratio = math.sqrt(cost / (2 * mean))
    return math.sqrt(2 * cost * mean) * (1 + ratio / 3 + ratio**2 / 9) - cost


def goodput(interval_s: float, costs: Costs) -> float:
    """Daly's complete model: failures may also strike during saves and restarts. What is not yet durable is lost with
    the interval, so `durable_s` counts as part of each restart. From 0 to 1."""
    mean = costs.mtbf_s
    lost = math.expm1(min(700.0, (interval_s + max(costs.blocked_s, _LEAST_S)) / mean))
    restart = math.exp(min(700.0, (costs.restart_s + costs.durable_s) / mean))
    return interval_s / (mean * restart * lost)


def goodputs(costs: Costs, intervals_s: Iterable[float]) -> list[tuple[float, float]]:
    """(interval, goodput) for each interval: for a report to compare with the chosen one."""
    return [(interval_s, goodput(interval_s, costs)) for interval_s in intervals_s]


def choose(costs: Costs, max_loss_s: float) -> Cadence:
    """The interval to save at. It is never so long that more than `max_loss_s` can be lost (interval and the time until
    a save is durable), and never so short that a save would begin before the one before is durable."""
    best = optimal_interval_s(costs.blocked_s, costs.mtbf_s)
    shortest, longest = max(costs.durable_s, _LEAST_S), max_loss_s - costs.durable_s
    interval_s = max(min(best, longest), shortest)
    seen = f"{costs.interruptions} interruptions in {_span(costs.running_s)}, so one in {_span(costs.mtbf_s)} expected"
    text = f"a save blocks training for {_span(costs.blocked_s)}; {seen}: the optimum is {_span(best)}"
    if longest < shortest:
        text += (
            f"; a save is durable after {_span(costs.durable_s)}, and up to {_span(shortest + costs.durable_s)} can be "
            f"lost, more than max_loss_s={max_loss_s:g}"
        )
    elif interval_s == longest:
        text += f"; max_loss_s={max_loss_s:g} less {_span(costs.durable_s)} until a save is durable is shorter"
    elif interval_s == shortest:
        text += f"; a save is durable only after {_span(costs.durable_s)}"
    return Cadence(interval_s, goodput(interval_s, costs), f"every {_span(interval_s)}: {text}", costs)


def costs(history: History, blocked_s: Sequence[float], durable_s: Sequence[float], running_s: float = 0.0) -> Costs:
    """Medians of the measured saves, with the run's history. `running_s`: of this epoch, since the history was read."""
    return Costs(
        blocked_s=statistics.median(blocked_s) if blocked_s else _LEAST_S,
        durable_s=statistics.median(durable_s) if durable_s else 0.0,
        restart_s=history.downtime_s,
        interruptions=history.interruptions,
        running_s=history.running_s + running_s,
    )


def history(heads: Iterable[Head]) -> History:
    """Of journal entries in order: all of them, or the first and the last of each epoch."""
    spans: dict[int, tuple[float, float]] = {}
    for head in heads:
        first, _ = spans.get(head.epoch, (head.time, head.time))
        spans[head.epoch] = (first, head.time)
    ordered = [spans[epoch] for epoch in sorted(spans) if epoch > 0]
    gaps = [max(0.0, after[0] - before[1]) for before, after in itertools.pairwise(ordered)]
    return History(
        interruptions=len(gaps),
        running_s=sum(max(0.0, last - first) for first, last in ordered),
        downtime_s=statistics.median(gaps) if gaps else 0.0,
    )


def borders(head: Head, entry: Callable[[int], Head], epochs_max: int = _EPOCHS_MAX) -> list[Head]:
    """The first and the last entry of each of the newest epochs, in order, for `history`. Reads few entries of a long
    journal: epochs only grow, so each border is searched for by halves."""
    found = [head]
    for _ in range(epochs_max):
        first = _first_of(found[0], entry)
        if first.version < found[0].version:
            found.insert(0, first)
        if first.version == 0:
            break
        found.insert(0, entry(first.version - 1))
    return found


def _first_of(head: Head, entry: Callable[[int], Head]) -> Head:
    """The first entry of `head`'s epoch."""
    low, high, stride = head.version, head, 1  # low: not known to be of the epoch, or `high` itself
    while low > 0:
        low = max(0, high.version - stride)
        there = entry(low)
        if there.epoch < head.epoch:
            break
        high, stride = there, stride * 2
    while high.version - low > 1:
        middle = entry((high.version + low) // 2)
        if middle.epoch < head.epoch:
            low = middle.version
        else:
            high = middle
    return high


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"

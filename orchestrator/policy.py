"""When to save and what to keep, as small values combined with `|`. Pure: steps, metrics and times are passed in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from orchestrator.rules import arguments
from orchestrator.rules.save_interval import Cadence, Costs, choose


class SavePolicy(Protocol):
    """`due`: is a save of `step` wanted, `elapsed_s` seconds after the last save began (None before the first)?"""

    @property
    def timed(self) -> bool:
        """Whether the answer depends on `elapsed_s`; then process 0's answer is broadcast to all hosts."""

    def due(self, step: int, elapsed_s: float | None) -> bool: ...


@runtime_checkable
class PredictablePolicy(SavePolicy, Protocol):
    """A timed policy that knows how long it will not be due by time alone; so that hosts need not ask at each step."""

    def quiet_s(self, elapsed_s: float | None) -> float: ...


@runtime_checkable
class Adaptive(SavePolicy, Protocol):
    """A policy that goes by what saves and failures cost in this run."""

    def informed(self, costs: Costs) -> Adaptive:
        """The same policy, knowing `costs`."""

    @property
    def cadence(self) -> Cadence | None:
        """What it has chosen, and why; None before it knows of any costs, or where it has no part that adapts."""


@runtime_checkable
class YieldsToSaves(SavePolicy, Protocol):
    """A policy that wants no save while one is in flight."""

    def while_saving(self) -> SavePolicy:
        """What of it is due even then."""


class Candidate(Protocol):
    """What a retention policy sees of a restorable step."""

    @property
    def step(self) -> int: ...
    @property
    def time(self) -> float: ...
    @property
    def metrics(self) -> dict[str, float]: ...


class KeepPolicy(Protocol):
    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        """The steps to keep, out of `steps` in commit order (newest last)."""


@runtime_checkable
class JudgesNewest(KeepPolicy, Protocol):
    """A policy that may let go even the step committed last, as long as it keeps another one. With all others the
    newest stays: a job comes back to it."""

    @property
    def judges_newest(self) -> bool: ...


@runtime_checkable
class JudgesMetrics(KeepPolicy, Protocol):
    """A policy of the user's that says which metrics it goes by; for one that does not say, heads carry all."""

    def metrics_needed(self, metrics: Mapping[str, float]) -> frozenset[str] | None:
        """The names it looks at in a step with these `metrics`; None: it may look at all."""


def lacking(keep: KeepPolicy | None, metrics: Mapping[str, float]) -> str:
    """What to tell who saves a step with these `metrics`, where `best` goes by one that is not among them; '' where it
    does not."""
    missing = sorted(_ranked(keep) - metrics.keys())
    if not missing:
        return ""
    names = ", ".join(map(repr, missing))
    given = ", ".join([repr(name) for name in metrics][:_NAMED_MAX]) or "none"
    more = f" and {len(metrics) - _NAMED_MAX} more" if len(metrics) > _NAMED_MAX else ""
    return (
        f"keep= goes by the metric {names}, which this save does not have; its metrics: {given}{more}. As long as no "
        "step has it, all are kept; then steps without it are never among the best"
    )


def _ranked(keep: KeepPolicy | None) -> frozenset[str]:
    match keep:
        case _Best(metric):
            return frozenset({metric})
        case _AnyKeep(policies):
            return frozenset().union(*map(_ranked, policies))
    return frozenset()


_NAMED_MAX = 20
METRICS_MAX = 64
METRICS_BYTES_MAX = 4096
_NUMBER_BYTES = 26  # at most, with colon and comma


def needed(keep: KeepPolicy | None, metrics: Mapping[str, float]) -> frozenset[str] | None:
    """The names of the metrics that `keep` judges a step with these `metrics` by; None: perhaps all."""
    match keep:
        case None | _Last() | _EveryNth() | _Within():
            return frozenset()
        case _Best(metric):
            return frozenset({metric})
        case _AnyKeep(policies):
            each = [needed(policy, metrics) for policy in policies]
            return None if None in each else frozenset().union(*(names for names in each if names))
        case JudgesMetrics():
            return keep.metrics_needed(metrics)
    return None


def carried(metrics: Mapping[str, float], keep: KeepPolicy | None) -> dict[str, float]:
    """Those of a step's metrics that each journal entry carries while the step is live: what `keep` judges by, always,
    and then the first ones, METRICS_MAX and METRICS_BYTES_MAX in all. An entry is a complete head: without a bound, the
    journal of a run that keeps k steps grows by k times all metrics with each save."""
    names = needed(keep, metrics)
    if names is None:
        return dict(metrics)
    chosen = {name for name in metrics if name in names}
    left = METRICS_BYTES_MAX - sum(map(_stored_bytes, chosen))
    for name in metrics:
        left -= 0 if name in chosen else _stored_bytes(name)
        if left < 0 or len(chosen) >= METRICS_MAX:
            break
        chosen.add(name)
    return {name: value for name, value in metrics.items() if name in chosen}


def _stored_bytes(name: str) -> int:
    return len(json.dumps(name, ensure_ascii=False).encode()) + _NUMBER_BYTES


def saves(name: str, policy: object) -> None:
    """Raises UsageError unless it says when to save."""
    arguments.can(name, policy, "due", "a policy that says when to save, such as oc.every(100)")


def keeps(name: str, policy: object) -> None:
    """Raises UsageError unless it says what to keep."""
    arguments.can(name, policy, "keep", "a policy that says what to keep, such as oc.last(5)")


@dataclass(frozen=True)
class _Every:
    n: int
    timed: bool = False

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return step % self.n == 0

    def __repr__(self) -> str:
        return f"every({self.n})"

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnySave((self, other))


@dataclass(frozen=True)
class _EverySeconds:
    seconds: float
    timed: bool = True

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return elapsed_s is None or elapsed_s >= self.seconds

    def quiet_s(self, elapsed_s: float | None) -> float:
        return 0.0 if elapsed_s is None else max(0.0, self.seconds - elapsed_s)

    def __repr__(self) -> str:
        return f"every_seconds({self.seconds:g})"

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnySave((self, other))


@dataclass(frozen=True)
class _Auto:
    max_loss_s: float
    cadence: Cadence | None = None
    timed: bool = True

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return elapsed_s is None or elapsed_s >= self._interval_s

    def quiet_s(self, elapsed_s: float | None) -> float:
        return 0.0 if elapsed_s is None else max(0.0, self._interval_s - elapsed_s)

    @property
    def _interval_s(self) -> float:
        return self.cadence.interval_s if self.cadence else self.max_loss_s

    def informed(self, costs: Costs) -> _Auto:
        return replace(self, cadence=choose(costs, self.max_loss_s))

    def __repr__(self) -> str:
        return f"auto(max_loss_s={self.max_loss_s:g})"

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnySave((self, other))


@dataclass(frozen=True)
class _Continuous:
    min_interval_s: float
    timed: bool = True

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return elapsed_s is None or elapsed_s >= self.min_interval_s

    def while_saving(self) -> SavePolicy:
        return _At(frozenset())

    def __repr__(self) -> str:
        return f"continuous(min_interval_s={self.min_interval_s:g})"

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnySave((self, other))


@dataclass(frozen=True)
class _At:
    steps: frozenset[int]
    timed: bool = False

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return step in self.steps

    def __repr__(self) -> str:
        return f"at({sorted(self.steps)})"

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnySave((self, other))


@dataclass(frozen=True)
class _AnySave:
    policies: tuple[SavePolicy, ...]

    def __post_init__(self) -> None:
        for policy in self.policies:
            saves("|", policy)

    @property
    def timed(self) -> bool:
        return any(policy.timed for policy in self.policies)

    def due(self, step: int, elapsed_s: float | None) -> bool:
        return any(policy.due(step, elapsed_s) for policy in self.policies)

    def quiet_s(self, elapsed_s: float | None) -> float:
        timed = [policy for policy in self.policies if policy.timed]
        quiet = [policy.quiet_s(elapsed_s) if isinstance(policy, PredictablePolicy) else 0.0 for policy in timed]
        return min(quiet, default=0.0)

    def while_saving(self) -> SavePolicy:
        return _AnySave(tuple(p.while_saving() if isinstance(p, YieldsToSaves) else p for p in self.policies))

    def informed(self, costs: Costs) -> _AnySave:
        told = (policy.informed(costs) if isinstance(policy, Adaptive) else policy for policy in self.policies)
        return _AnySave(tuple(told))

    @property
    def cadence(self) -> Cadence | None:
        found = [policy.cadence for policy in self.policies if isinstance(policy, Adaptive) and policy.cadence]
        return min(found, key=lambda each: each.interval_s, default=None)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return _AnySave((*self.policies, other))


def every(n: int) -> _Every:
    """Save at steps divisible by `n` (step 0 included). Raises UsageError unless n >= 1."""
    return _Every(arguments.whole("every: n", n, least=1))


def every_seconds(seconds: float) -> _EverySeconds:
    """Save when `seconds` have passed since the last save began; process 0's clock decides for all hosts."""
    return _EverySeconds(arguments.seconds("every_seconds: seconds", seconds))


def auto(max_loss_s: float = 600.0) -> _Auto:
    """Save at the interval that loses least time to saves and failures, as this run has measured them: Daly's optimum
    for how long a save blocks training and how often the job is interrupted, but at most `max_loss_s` of training can
    be lost. The first save of an incarnation is due at once; process 0 decides for all hosts."""
    return _Auto(arguments.seconds("auto: max_loss_s", max_loss_s))


def continuous(min_interval_s: float = 0.0) -> _Continuous:
    """Save whenever no save is in flight and `min_interval_s` have passed since the last one began; process 0 decides
    for all hosts. The least work is lost, for the most writing: the store is busy all the time, and all hosts ask
    process 0 at every step."""
    least_s = min_interval_s if min_interval_s == 0 else arguments.seconds("continuous: min_interval_s", min_interval_s)
    return _Continuous(float(least_s))


def at(steps: Iterable[int]) -> _At:
    """Save at exactly these steps."""
    arguments.can("at: steps", steps, "__iter__", "whole numbers, such as [100, 250]")
    return _At(frozenset(arguments.whole("at: a step", step) for step in steps))


@dataclass(frozen=True)
class _Last:
    n: int

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        return frozenset(entry.step for entry in steps[-self.n :])

    def __repr__(self) -> str:
        return f"last({self.n})"

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _AnyKeep((self, other))


@dataclass(frozen=True)
class _EveryNth:
    n: int

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        return frozenset(entry.step for entry in steps if entry.step % self.n == 0)

    def __repr__(self) -> str:
        return f"every_nth({self.n})"

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _AnyKeep((self, other))


@dataclass(frozen=True)
class _Best:
    metric: str
    n: int
    mode: Literal["min", "max"]

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        told = [entry for entry in steps if self.metric in entry.metrics]
        # NaN compares false with everything and would make the order depend on the input's: it is never best.
        scored = [entry for entry in told if entry.metrics[self.metric] == entry.metrics[self.metric]]
        if not scored:  # Nothing is known of any of them: a metric that is missing is perhaps only called otherwise.
            untold = [entry for entry in steps if self.metric not in entry.metrics]
            return frozenset(entry.step for entry in (*untold, *told[-self.n :]))
        scored.sort(key=lambda entry: entry.metrics[self.metric], reverse=self.mode == "max")
        return frozenset(entry.step for entry in scored[: self.n])

    def __repr__(self) -> str:
        return f"best({self.metric!r}, {self.n}, mode={self.mode!r})"

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _AnyKeep((self, other))


@dataclass(frozen=True)
class _Within:
    seconds: float

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        return frozenset(entry.step for entry in steps if now - entry.time <= self.seconds)

    def __repr__(self) -> str:
        return f"within({self.seconds:g})"

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _AnyKeep((self, other))


@dataclass(frozen=True)
class _AnyKeep:
    policies: tuple[KeepPolicy, ...]

    def __post_init__(self) -> None:
        for policy in self.policies:
            keeps("|", policy)

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        return frozenset().union(*(policy.keep(steps, now) for policy in self.policies))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))

    def __or__(self, other: KeepPolicy) -> KeepPolicy:
        return _AnyKeep((*self.policies, other))


def last(n: int) -> _Last:
    """Keep the `n` most recently committed steps."""
    return _Last(arguments.whole("last: n", n, least=1))


def every_nth(n: int) -> _EveryNth:
    """Keep every step divisible by `n`, forever."""
    return _EveryNth(arguments.whole("every_nth: n", n, least=1))


def best(metric: str, n: int = 1, *, mode: Literal["min", "max"] = "min") -> _Best:
    """Keep the `n` steps with the best `metric`; steps without it, or with NaN, are never best.

    As long as no step has a number under that name, nothing is known of any: those without it all stay, and of those
    with NaN the `n` newest. A save that lacks it is named in a warning, once.
    """
    if not isinstance(metric, str) or not arguments.is_utf8(metric):
        raise arguments.rejection("best: metric", metric, "a metric's name")
    arguments.choice("best: mode", mode, "min", "max")
    return _Best(metric, arguments.whole("best: n", n, least=1), mode)


def within(seconds: float) -> _Within:
    """Keep steps committed in the last `seconds`."""
    return _Within(arguments.seconds("within: seconds", seconds))

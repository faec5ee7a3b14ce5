"""Orbax's CheckpointManagerOptions as policies and options of ours. What has no counterpart is rejected by name."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from absl import logging

from orchestrator.arrays.format.orbax_api import Keeps
from orchestrator.errors import UsageError
from orchestrator.options import Options
from orchestrator.policy import Candidate

# Option -> what to do instead. Each is rejected where it has another value than Orbax's default.
REJECTED = {
    "step_prefix": "steps are found by their number; leave it out",
    "step_format_fixed_length": "steps are found by their number; leave it out",
    "step_name_format": "steps are found by their number; leave it out",
    "todelete_subdir": "retired data is deleted in the background; leave it out",
    "todelete_full_path": "retired data is deleted in the background; leave it out",
    "atomicity_options": "a step is committed by one journal entry; leave it out",
    "temporary_path_class": "a step is committed by one journal entry; leave it out",
    "file_options": "set the umask of the process instead",
    "multiprocessing_options": "all processes of jax.distributed take part; leave it out",
}


@dataclass(frozen=True)
class StepInfo:
    """A step as Orbax's policies see it. `metrics`: None where the step has none."""

    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None


def info(step: int, time_s: float, metrics: dict[str, float] | None) -> StepInfo:
    return StepInfo(step, datetime.datetime.fromtimestamp(time_s, tz=datetime.UTC), metrics or None)


def check(options: Any, defaults: Any) -> None:
    """Raises UsageError naming the first option that cannot be honoured here."""
    for name, instead in REJECTED.items():
        given = getattr(options, name, None)  # older versions of Orbax lack some
        if given != getattr(defaults, name, None):
            raise UsageError(f"CheckpointManagerOptions({name}={given!r}): not supported; {instead}")
    if type(options.save_decision_policy).__name__ == "ContinuousCheckpointingPolicy":
        raise UsageError(
            "CheckpointManagerOptions(save_decision_policy=ContinuousCheckpointingPolicy): it goes by each "
            "process's own clock; use orchestrator.Agent(save=oc.every_seconds(...)) or oc.auto()"
        )
    for name in ("barrier_sync_fn", "post_finalization_callback"):
        if getattr(options.async_options, name, None) is not None:
            raise UsageError(
                f"AsyncOptions({name}=...): not supported; leave it out (oc.open_run(root).watch() tells of commits)"
            )


def ours(options: Any) -> Options:
    """`enable_async_checkpointing` and `async_options.timeout_secs`; a failed save is logged and counted."""
    plain = Options(async_save=options.enable_async_checkpointing, other_tree=True)
    if options.async_options is None:
        return plain
    return replace(plain, save_timeout_s=float(options.async_options.timeout_secs))


@dataclass(frozen=True)
class KeepAsOrbax:
    """`max_to_keep`, `keep_period`, `keep_time_interval`, `best_fn` and `preservation_policy`, by Orbax's own rules.

    To Orbax, NaN is as good as any number, and a run that has diverged deletes its best steps. Those that Orbax's rules
    keep when nobody has NaN stay, too. A step whose metrics `best_fn` fails on stays: nothing is known against it, and
    retention is no reason to lose the save that it goes with."""

    keeps: Keeps

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        infos = [info(each.step, each.time, each.metrics) for each in steps]
        has_number = {each.step: self._has_number(each) for each in infos}
        judged = [each for each in infos if has_number[each.step] is not None]
        numbers = [each for each in judged if has_number[each.step]]
        kept = frozenset(has_number) - {each.step for each in judged}
        if judged:
            kept |= self.keeps.keep(judged)
        if 0 < len(numbers) < len(judged):
            kept |= self.keeps.keep(numbers)
        return kept

    def _has_number(self, about: StepInfo) -> bool | None:
        """Whether no score of it is NaN; None where one cannot be had."""
        try:
            return not any(is_nan(score, about) for score in self.keeps.scores or ())
        except Exception as error:  # the user's function
            logging.warning("step %d: best_fn raised %r; the step stays", about.step, error)
            return None

    def metrics_needed(self, metrics: Mapping[str, float]) -> frozenset[str] | None:
        """Found by asking each score, as Orbax would, and watching what it looks at."""
        if self.keeps.scores is None:
            return None
        asked = _Asked(metrics)
        for score in self.keeps.scores if metrics else ():
            try:
                score(asked)
            except Exception:  # whatever the user's function raises; retention will hear of it
                return None
        return None if asked.all else frozenset(asked.names)


class _Asked(Mapping[str, float]):
    """Metrics that note what is asked of them. `all`: more than single names."""

    def __init__(self, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self.names: set[str] = set()
        self.all = False

    def __getitem__(self, name: str) -> float:
        self.names.add(name)
        return self._metrics[name]

    def __iter__(self) -> Iterator[str]:
        self.all = True
        return iter(self._metrics)

    def __len__(self) -> int:
        self.all = True
        return len(self._metrics)


def is_nan(score: Callable[[Any], float], about: StepInfo) -> bool:
    value = None if about.metrics is None else score(about.metrics)
    return bool(value != value)


@dataclass(frozen=True)
class KeepAllBut:
    """For `delete(step)`."""

    step: int

    def metrics_needed(self, metrics: Mapping[str, float]) -> frozenset[str]:
        return frozenset()

    def keep(self, steps: Sequence[Candidate], now: float) -> frozenset[int]:
        return frozenset(each.step for each in steps) - {self.step}


def best(infos: Sequence[StepInfo], best_fn: Callable[[Any], float], mode: str) -> int | None:
    """The step with the best metric; on a tie the later, as in Orbax. NaN is the best only where all are NaN."""
    scored = [each for each in infos if each.metrics is not None]
    numbers = [each for each in scored if not is_nan(best_fn, each)]
    ordered = sorted(numbers or scored, key=lambda each: best_fn(each.metrics), reverse=mode == "min")
    return ordered[-1].step if ordered else None

"""Orbax's CheckpointManagerOptions as policies and options of ours. What has no counterpart is rejected by name."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from absl import logging

from orchestrator.arrays.format import orbax_api
from orchestrator.arrays.format.orbax_api import Keeps
from orchestrator.compat import nested_metrics
from orchestrator.compat.save_args import say_once
from orchestrator.errors import UsageError
from orchestrator.options import Options
from orchestrator.policy import Candidate

# Every option of every Orbax that we take is in one of these three. Class -> option -> why it has no effect, which is
# said once where it has another value than Orbax's default.
WITHOUT_EFFECT = {
    "CheckpointManagerOptions": {
        "atomicity_options": "a step is committed by one journal entry",
        "temporary_path_class": "a step is committed by one journal entry",
        "file_options": "the files of a run have the permissions that the process's umask gives them",
        "enable_per_process_directory_creation": "directories are made by whoever writes into them",
        "enable_should_save_is_saving_in_progress_check": "policies are told whether a save is in progress",
    },
    "AsyncOptions": {
        "barrier_sync_fn": "a save here waits at no barrier",
        "create_directories_asynchronously": "directories are made by whoever writes into them",
    },
}
# What they ask for is so in any case, or there is nothing to do.
ALREADY_SO = {
    "CheckpointManagerOptions": (
        *("cleanup_tmp_directories", "enable_background_delete", "num_deletion_threads"),
        *("single_host_load_and_broadcast", "lightweight_initialize"),
    ),
    "MultiprocessingOptions": ("barrier_sync_key_prefix",),
}
# Honoured, or rejected by name where a value cannot be.
COUNTERPARTS = {
    "CheckpointManagerOptions": (
        *("save_interval_steps", "save_on_steps", "should_save_fn", "save_decision_policy"),
        *("max_to_keep", "keep_time_interval", "keep_period", "should_keep_fn", "preservation_policy"),
        *("best_fn", "best_mode", "keep_checkpoints_without_metrics", "prevent_write_metrics"),
        *("step_prefix", "step_format_fixed_length", "step_name_format", "todelete_subdir", "todelete_full_path"),
        *("create", "read_only", "save_root_metadata"),
        *("enable_async_checkpointing", "async_options", "multiprocessing_options"),
    ),
    "AsyncOptions": ("timeout_secs", "post_finalization_callback"),
    "MultiprocessingOptions": ("primary_host", "active_processes"),
}


@dataclass(frozen=True)
class StepInfo:
    """A step as Orbax's policies see it. `metrics`: None where the step has none."""

    step: int
    time: datetime.datetime
    metrics: dict[str, Any] | None


def info(step: int, time_s: float, metrics: Mapping[str, float] | None) -> StepInfo:
    """`metrics`: by flat names, as they are stored."""
    time = datetime.datetime.fromtimestamp(time_s, tz=datetime.UTC)
    return StepInfo(step, time, nested_metrics.joined(metrics) if metrics else None)


def now(step: int) -> StepInfo:
    """A step that may be saved now."""
    return info(step, time.time(), None)


def check(options: Any, defaults: Any, process_count: int, *, in_store: bool) -> None:
    """Raises UsageError naming the first option that cannot be honoured here. What has no effect is said once."""
    _check_names(options, defaults)
    _check_names(options.multiprocessing_options, defaults.multiprocessing_options)
    if options.async_options is not None:
        _check_names(options.async_options, orbax_api.public("options").AsyncOptions())
    if in_store and options.todelete_subdir:
        say_once("CheckpointManagerOptions.todelete_subdir", "as in Orbax, it is for file systems")
    if in_store and getattr(options, "todelete_full_path", None):
        raise UsageError(
            "CheckpointManagerOptions(todelete_full_path=...): retired data is deleted here, not moved; leave it out, "
            "or keep more steps"
        )
    if options.preservation_policy and (options.keep_time_interval or options.max_to_keep or options.keep_period):
        raise UsageError("CheckpointManagerOptions: preservation_policy excludes max_to_keep, keep_period and the like")
    processes = options.multiprocessing_options
    active = getattr(processes, "active_processes", None)
    if active is not None and set(active) != set(range(process_count)):
        raise UsageError(
            f"MultiprocessingOptions(active_processes={sorted(active)}): all {process_count} processes of the job "
            "take part in a save; leave it out"
        )
    if getattr(processes, "primary_host", 0) is None and process_count > 1:
        raise UsageError(
            "MultiprocessingOptions(primary_host=None): each process would save to a directory of its own; give all "
            "the same directory, and leave it out"
        )


def _check_names(options: Any, defaults: Any) -> None:
    """Say what has no effect. Raises UsageError naming an option of a newer Orbax, of which nothing is known here."""
    kind = type(defaults).__name__
    ignored = WITHOUT_EFFECT.get(kind, {})
    for each in fields(defaults):
        if getattr(options, each.name, None) == getattr(defaults, each.name):
            continue
        if each.name in ignored:
            say_once(f"{kind}.{each.name}", ignored[each.name])
        elif each.name not in (*COUNTERPARTS[kind], *ALREADY_SO.get(kind, ())):
            raise UsageError(f"{kind}.{each.name} came with a newer Orbax and is not known here; leave it out")


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
    judges_newest: bool = True  # by Orbax's rules it may be among those that go

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
        asked = _Asked(nested_metrics.joined(metrics))
        for score in self.keeps.scores if metrics else ():
            try:
                score(asked)
            except Exception:  # whatever the user's function raises; retention will hear of it
                return None
        if asked.all:
            return None
        below = {name for name in metrics if name.startswith("/") and nested_metrics.parts(name)[0] in asked.names}
        return frozenset(below | {name for name in asked.names if name in metrics or not below})


class _Asked(Mapping[str, Any]):
    """Metrics that note what is asked of them. `all`: more than single names."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics
        self.names: set[str] = set()
        self.all = False

    def __getitem__(self, name: str) -> Any:
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


def best(infos: Sequence[StepInfo], best_fn: Callable[[Any], float], mode: str) -> int | None:
    """The step with the best metric; on a tie the later, as in Orbax. NaN is the best only where all are NaN."""
    scored = [each for each in infos if each.metrics is not None]
    numbers = [each for each in scored if not is_nan(best_fn, each)]
    ordered = sorted(numbers or scored, key=lambda each: best_fn(each.metrics), reverse=mode == "min")
    return ordered[-1].step if ordered else None

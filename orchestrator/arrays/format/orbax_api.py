"""What `compat` takes from Orbax itself, all of it public: names to hand through, and its save and retention policies,
so that a loop written for Orbax saves and keeps the same steps here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

PLACEHOLDER = ocp.PLACEHOLDER  # in a target: this leaf is not to be restored


def public(name: str) -> Any:
    """`orbax.checkpoint.<name>`. Raises AttributeError."""
    return getattr(ocp, name)


def path(directory: str) -> Any:
    """`CheckpointManager.directory` is an epath in Orbax; loops join names to it."""
    return epath.Path(directory)


def value_metadata(name: str, value: Any) -> Any:
    """Orbax's description of a number or a text."""
    if isinstance(value, str):
        return ocp.metadata.StringMetadata(name=name, directory=None)
    return ocp.metadata.ScalarMetadata(name=name, directory=None, dtype=np.asarray(value).dtype)


def key_name(key: Any) -> Any:
    """What a key of a path is called: a dict's key, a position, a field's name."""
    return next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key)


def step_exists(message: str) -> Exception:
    """What Orbax raises for a step that is there already; loops catch it."""
    error: Exception = ocp.checkpoint_manager.StepAlreadyExistsError(message)
    return error


def step_names(options: Any) -> Any:
    """How step directories are called, for given CheckpointManagerOptions: `build_name(step)`."""
    return options.step_name_format or ocp.path.step.standard_name_format(
        step_prefix=options.step_prefix, step_format_fixed_length=options.step_format_fixed_length
    )


def sharding_of(text: str) -> Any:
    """The sharding that Orbax's text describes, as it restores onto it without a target; None where this process's
    devices do not allow it, or the kind has no description."""
    kinds = {
        "NamedSharding": ocp.metadata.NamedShardingMetadata,
        "SingleDeviceSharding": ocp.metadata.SingleDeviceShardingMetadata,
    }
    try:
        described = json.loads(text)
        return kinds[described["sharding_type"]].from_deserialized_dict(described).to_jax_sharding()
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError):
        return None


def registered_handler(args: Any) -> type | None:
    """The class of the handler that args were registered with; None for args of nobody's."""
    try:
        found: type = ocp.checkpoint_args.get_registered_handler_cls(args)
    except (TypeError, ValueError):
        return None
    return found


def registered_args(handler: Any, direction: str) -> Any:
    """The args class that a handler was registered with, for Save or Restore; None without any."""
    try:
        saving, restoring = ocp.checkpoint_args.get_registered_args_cls(handler)
    except ValueError:
        return None
    return saving if direction == "Save" else restoring


class Saves:
    """Orbax's decision whether to save a step, for given CheckpointManagerOptions."""

    def __init__(self, options: Any) -> None:
        managers = ocp.checkpoint_managers
        self._policy = options.save_decision_policy
        if self._policy is None and options.should_save_fn is None:
            policies = [managers.PreemptionCheckpointingPolicy(), managers.InitialSavePolicy()]
            if options.save_interval_steps:
                policies.append(managers.FixedIntervalPolicy(options.save_interval_steps))
            if options.save_on_steps is not None:
                policies.append(managers.SpecificStepsPolicy(options.save_on_steps))
            self._policy = managers.AnySavePolicy(policies)
        self._function = None if options.save_decision_policy else options.should_save_fn
        # Whether the answer depends on a clock, or on what goes on in this process: then process 0's counts.
        self.own_policy = options.save_decision_policy is not None
        kind = getattr(managers, "ContinuousCheckpointingPolicy", ())  # came with a version
        self.continuous = any(isinstance(each, kind) for each in getattr(self._policy, "policies", [self._policy]))

    def due(self, step: Any, before: Sequence[Any], *, saving: bool, preempted: bool) -> bool:
        """`step` and `before`: objects with `step`, `time` (datetime) and `metrics`, oldest first."""
        if self._function:
            return bool(preempted or self._function(step.step, before[-1].step if before else None))
        context = ocp.checkpoint_managers.DecisionContext(
            is_saving_in_progress=saving,
            reached_preemption=preempted,
            multiprocessing_options=ocp.options.MultiprocessingOptions(),
        )
        return bool(self._policy.should_save(step, before, context=context))


class Keeps:
    """Orbax's decision which steps to keep, for given CheckpointManagerOptions.

    scores: the functions of a step's metrics that it goes by; None for a policy of the user's own, which may look at
    all of them."""

    def __init__(self, options: Any) -> None:
        self._policy = options.preservation_policy or self._default(options)
        self._keep = getattr(options, "should_keep_fn", None)  # up to Orbax 0.11, in addition to all others
        found = list(_scores(self._policy))
        self.scores = None if None in found else tuple(score for score in found if score)

    @staticmethod
    def _default(options: Any) -> Any:
        managers = ocp.checkpoint_managers
        policies: list[Any] = []
        if options.keep_period is not None:
            policies.append(managers.EveryNSteps(options.keep_period))
        if options.keep_time_interval is not None:
            policies.append(managers.EveryNSeconds(interval_secs=int(options.keep_time_interval.total_seconds())))
        if options.best_fn is None:
            policies.append(managers.LatestN(n=options.max_to_keep))
        else:
            policies.append(
                managers.BestN(
                    get_metric_fn=options.best_fn,
                    reverse=options.best_mode == "min",
                    n=options.max_to_keep,
                    keep_checkpoints_without_metrics=options.keep_checkpoints_without_metrics,
                )
            )
        return managers.AnyPreservationPolicy(policies)

    def keep(self, steps: Sequence[Any]) -> frozenset[int]:
        """Which of `steps` (as in `Saves.due`) stay."""
        kept = self._policy.should_preserve(steps, context=ocp.checkpoint_managers.PreservationContext())
        stay = frozenset(each.step for each, keep in zip(steps, kept, strict=True) if keep)
        return stay | frozenset(each.step for each in steps if each.step not in stay and self._is_wanted(each.step))

    def _is_wanted(self, step: int) -> bool:
        try:
            return self._keep is not None and bool(self._keep(step))
        except Exception as error:  # the user's function
            logging.warning("step %d: should_keep_fn raised %r; the step stays", step, error)
            return True


def _scores(policy: Any) -> Iterator[Callable[[Any], float] | None]:
    """The scores that a policy of Orbax's goes by; None for a policy that is not Orbax's."""
    managers = ocp.checkpoint_managers
    names = ("LatestN", "LatestDuration", "EveryNSeconds", "EveryNSteps", "EveryNStepsClosest", "CustomSteps")
    by_step_or_time = [getattr(managers, name) for name in names if hasattr(managers, name)]  # each came with a version
    if type(policy) is managers.AnyPreservationPolicy:
        for each in policy.policies:
            yield from _scores(each)
    elif type(policy) is managers.BestN:
        yield policy.get_metric_fn
    elif type(policy) not in by_step_or_time:
        yield None

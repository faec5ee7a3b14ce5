"""`orbax.checkpoint.v1.training`: its Checkpointer is ours, kept by an agent; policies and metadata are Orbax's.

Different on purpose: a save that fails is logged and counted, its result is False, and the loop goes on; `load(None)`
steps down past a damaged newest step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from orchestrator.arrays.format import orbax_api, orbax_v1
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.stored_steps import NoSuchStep
from orchestrator.compat.v1 import items, settings
from orchestrator.compat.v1.older_names import older_name
from orchestrator.compat.v1.responses import SaveResponse
from orchestrator.compat.v1.steps import Steps
from orchestrator.errors import UsageError
from orchestrator.rules.records import Json

_HANDED_THROUGH = (
    *("CheckpointMetadata", "RootMetadata", "errors"),
    *("preservation_policies", "save_decision_policies"),
)


def __getattr__(name: str) -> Any:
    if name in _HANDED_THROUGH:
        return orbax_v1.public("training", name)
    if name == "pathways":
        raise AttributeError("orchestrator.compat.v1.training.pathways is not supported; leave it out")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class NoSuchCheckpoint(NoSuchStep, orbax_v1.StepNotFoundError):  # type: ignore[misc,valid-type]
    """There is no such step, or none at all. Orbax raises StepNotFoundError."""


class StepIsThere(UsageError, orbax_v1.StepAlreadyExistsError):  # type: ignore[misc,valid-type]
    """The step is there already. Orbax raises StepAlreadyExistsError."""


class Checkpointer:
    """As `orbax.checkpoint.v1.training.Checkpointer`, on an ordinary run of ours. Main thread, all processes in the
    same order; responses may be waited for on any thread.

    Raises UsageError for options of the context that have no counterpart, and for a directory that holds Orbax's own
    steps and has not been adopted.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        context: Any = None,
        save_decision_policy: Any = None,
        preservation_policy: Any = None,
        step_name_format: Any = None,
        custom_metadata: Mapping[str, Json] | None = None,
        cleanup_tmp_directories: bool = False,
        lightweight_initialize: bool = False,
        logger: Any = None,
    ) -> None:
        self._context = orbax_v1.public("Context")(context or orbax_v1.context())
        options = settings.manager_options(
            self._context,
            save_decision_policy=save_decision_policy or _as_often_as_possible(),
            preservation_policy=preservation_policy,
            max_to_keep=None,
            step_name_format=step_name_format,
            cleanup_tmp_directories=cleanup_tmp_directories,
            lightweight_initialize=lightweight_initialize,
        )
        self._steps = Steps(directory, options=options, metadata=custom_metadata, logger=logger)
        self._newest: tuple[int, SaveResponse[bool]] | None = None  # the save begun last

    # Questions.

    @property
    def directory(self) -> Any:
        return self._steps.directory

    @property
    def checkpoints(self) -> Sequence[Any]:
        """Metadata of the steps, by number; that of a step being saved, too. Of what others have saved, `reload`
        tells."""
        steps = self._steps
        found = {live.step: self._described(live.step, live.time, steps.metrics_of(live)) for live in steps.live()}
        for info in steps.begun():
            found.setdefault(info.step, self._described(info.step, info.time.timestamp(), info.metrics))
        return [found[step] for step in sorted(found)]

    @property
    def latest(self) -> Any:
        """The step committed last, or the one that is being saved; None in a new run. Raises NothingToRestore where all
        steps are quarantined."""
        step = self._steps.latest_step()
        return next((each for each in self.checkpoints if each.step == step), None)

    def _described(self, step: int, time_s: float, metrics: Any, **more: Any) -> Any:
        about = {"metadata": None, "commit_timestamp_nsecs": int(time_s * 1e9), **more}
        named = ("training", "CheckpointMetadata")
        return orbax_v1.described(*named, step=step, path=self._steps.path(step), metrics=metrics, **about)

    def should_save(self, step: Any) -> bool:
        return self._steps.should_save(_number(step))

    def is_saving_in_progress(self) -> bool:
        return self._steps.is_saving_in_progress()

    def root_metadata(self) -> Any:
        found = self._steps.metadata().custom_metadata
        return orbax_v1.public("training", "RootMetadata")(directory=self.directory, custom_metadata=found)

    def metadata(self, step: Any = None) -> Any:
        """Of the pytree that `load` takes: abstract arrays in the structure of what was saved."""
        stored = self._stored(step)
        return self._metadata(stored, items.tree_name(stored, items.AUTO))

    def checkpointables_metadata(self, step: Any = None) -> Any:
        """Of all objects, by name; what a handler says of its own, None where nothing is known."""
        return self._metadata(self._stored(step), None)

    def _metadata(self, stored: StoredItems, name: str | None) -> Any:
        found = self._steps.describe(stored, self._effective())
        metrics = self._steps.metrics_tree(stored.step)
        metadata = found.metadata if name is None else found.metadata[name]
        times = {"init_timestamp_nsecs": found.time_ns, "commit_timestamp_nsecs": found.time_ns}
        custom = found.custom_metadata
        return self._described(stored.step, 0.0, metrics, metadata=metadata, custom_metadata=custom, **times)

    def _stored(self, step: Any) -> Any:
        try:
            return self._steps.stored(None if step is None else _number(step))
        except NoSuchStep as error:
            raise NoSuchCheckpoint(*error.args) from None

    def _effective(self) -> Any:
        """The context that the caller is in, or else the one that this was made with."""
        about = orbax_v1.context(self._context)
        settings.check(about)
        return about

    # Saving.

    def save(self, step: int, state: Any, **given: Any) -> bool:
        """`save_async`, waited for. False if it was not due, or has failed."""
        response = self.save_async(step, state, **given)
        return response is not None and response.result()

    def save_checkpointables(self, step: int, checkpointables: dict[str, Any], **given: Any) -> bool:
        response = self.save_checkpointables_async(step, checkpointables, **given)
        return response is not None and response.result()

    def save_async(
        self, step: int, state: Any, *, checkpointable_name: str = orbax_v1.STATE, **given: Any
    ) -> SaveResponse[bool] | None:
        """Save a pytree if it is due, in the background; None if it is not. What `save_checkpointables_async` takes by
        name, this takes, too."""
        items.check_state(state)
        return self.save_checkpointables_async(step, {checkpointable_name: state}, **given)

    def save_checkpointables_async(
        self,
        step: int,
        checkpointables: dict[str, Any],
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Json] | None = None,
    ) -> SaveResponse[bool] | None:
        """Save objects by name if they are due, in the background; None if they are not. `overwrite`: a step that is
        there is replaced once the new one is committed, and stays if it never is. Waits for the save before it.
        Raises StepAlreadyExistsError, UsageError, a KeyError for an object that no handler is for, Fenced."""
        if not overwrite and step in self._steps:
            raise StepIsThere(f"{self._steps.directory}: step {step} is there already; overwrite=True replaces it")
        args = items.to_save(checkpointables, self._effective())
        response = self._response(step)
        if not self._steps.save_items(
            step,
            args,
            force=force,
            overwrite=overwrite,
            metrics=metrics,
            custom_metadata=custom_metadata,
            on_commit=response.committed,
        ):
            return None
        if self._newest is not None:  # the save before has ended: later nobody could tell how
            before, its_response = self._newest
            its_response.ended(not self._steps.has_failed(before))
        self._newest = step, response
        return response

    def _response(self, step: int) -> SaveResponse[bool]:
        def settle() -> bool:
            self._steps.wait_until_finished()
            return not self._steps.has_failed(step)

        return SaveResponse(settle, True, lambda: self._steps.is_saving(step))

    def cancel(self, step: Any = None) -> None:
        raise UsageError("Checkpointer.cancel: a save that has begun is committed or fails by itself; use delete(step)")

    # Loading.

    def load(
        self, step: Any = None, abstract_state: Any = None, *, checkpointable_name: str | None = orbax_v1.STATE
    ) -> Any:
        """A pytree, into `abstract_state` if that is given. `step=None`: the newest good one.

        Raises StepNotFoundError, InvalidLayoutError without such a pytree, Mismatch naming each leaf that does not fit,
        Damaged for a given step that is."""
        stored = self._stored(step)
        name = items.tree_name(stored, checkpointable_name)
        number = None if step is None else _number(step)
        found = self._steps.load_items(number, stored, {name: items.abstract_of(abstract_state)}, self._effective())
        return found[name]

    def load_checkpointables(self, step: Any = None, abstract_checkpointables: Any = None) -> dict[str, Any]:
        """Objects by name, each into its abstract twin (None: as it was saved); without any, all there are."""
        stored = self._stored(step)
        given = items.given_or_all(stored, abstract_checkpointables)
        number = None if step is None else _number(step)
        return self._steps.load_items(number, stored, given, self._effective())

    def load_async(self, step: Any = None, abstract_state: Any = None) -> Any:
        raise NotImplementedError("Checkpointer.load_async: use load")

    def load_checkpointables_async(self, step: Any = None, abstract_checkpointables: Any = None) -> Any:
        raise NotImplementedError("Checkpointer.load_checkpointables_async: use load_checkpointables")

    # The rest.

    def delete(self, step: Any, *, checkpointable_name: str | None = None, missing_ok: bool = False) -> bool:
        """Retire a step; its data is deleted in the background. Raises StepNotFoundError, UsageError for the only step,
        for a pinned one, and for a part of a step: what is committed does not change."""
        if checkpointable_name is not None:
            raise UsageError(f"delete(checkpointable_name={checkpointable_name!r}): a committed step does not change")
        number = _number(step)
        try:
            self._steps.delete(number)
        except NoSuchStep as error:
            if missing_ok:
                return False
            raise NoSuchCheckpoint(*error.args) from None
        return True

    def delete_async(self, step: Any, **given: Any) -> SaveResponse[bool]:
        """`delete`: its answer is there at once."""
        deleted = self.delete(step, **given)
        response = SaveResponse(lambda: deleted, deleted, lambda: False)
        response.committed()
        return response

    def reload(self) -> None:
        self._steps.reload()

    def wait(self) -> None:
        self._steps.wait_until_finished()

    def close(self) -> None:
        self._steps.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._steps.__exit__(kind, value, trace)

    save_pytree = older_name(save)
    save_pytree_async = older_name(save_async)
    load_pytree = older_name(load)
    load_pytree_async = older_name(load_async)
    pytree_metadata = older_name(metadata)


def _number(step: Any) -> int:
    return step if isinstance(step, int) else int(step.step)


def _as_often_as_possible() -> Any:
    managers = orbax_api.public("checkpoint_managers")
    kinds = ("InitialSavePolicy", "ContinuousCheckpointingPolicy", "PreemptionCheckpointingPolicy")
    return managers.AnySavePolicy([getattr(managers, kind)() for kind in kinds])

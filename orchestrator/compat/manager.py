"""A CheckpointManager with Orbax's (0.12.8) methods, arguments and results, kept by an agent. Its face: `compat`.

A facade: questions about steps are in `step_questions`, what is stored in `stored_steps`, what Orbax's policies are
told in `known_steps`, options and items in `orbax_options`, `orbax_items` and `item_handlers`, the directories that
Orbax would have made in `step_views`. What has no counterpart here is rejected by name, when the manager is made or the
item is saved. Main thread, all processes in the same order, as with `Agent`; but `wait_until_finished` may be called on
any thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from absl import logging

from orchestrator.arrays.format import orbax_api
from orchestrator.compat import nested_metrics, orbax_items, orbax_options, root_metadata
from orchestrator.compat.item_handlers import ItemHandlers
from orchestrator.compat.known_steps import KnownSteps
from orchestrator.compat.managed_run import ManagedRun
from orchestrator.compat.restore_items import restore_items
from orchestrator.compat.step_questions import StepQuestions
from orchestrator.compat.step_statistics import RestoreStatistics, SaveStatistics, StatisticsLog
from orchestrator.rules import arguments
from orchestrator.rules.records import Json


class CheckpointManager(StepQuestions):
    """As `orbax.checkpoint.CheckpointManager`. The run is an ordinary one: `orchestrator ls`, `oc.open_run` and
    `oc.Agent` work on it.

    The first `save` opens an epoch: from then on an older incarnation of the job cannot commit.
    With `read_only=True` nothing is ever written, whichever method is called: as in Orbax, `save` returns False and
    `delete` does nothing; `restore` steps down past damaged steps and leaves them as they are.
    Raises UsageError for options and handlers that have no counterpart, and for a directory that holds Orbax's own
    steps and has not been adopted.
    """

    _single = False  # as of ManagedRun

    def __init__(
        self,
        directory: str | os.PathLike[str],
        checkpointers: Any = None,
        options: Any = None,
        metadata: Mapping[str, Json] | None = None,
        item_names: Sequence[str] | None = None,
        item_handlers: Any = None,
        logger: Any = None,
        handler_registry: Any = None,
    ) -> None:
        orbax = options or orbax_api.public("CheckpointManagerOptions")()
        self._items = ItemHandlers.of(checkpointers, item_names, item_handlers, handler_registry)
        self._saves = orbax_api.Saves(orbax)
        given = root_metadata.checked(metadata)
        run = ManagedRun(os.fspath(directory), orbax, single=self._single)
        # Only a policy of the user's own may look at the metrics of the steps before.
        known = KnownSteps(run.stored, run.rendezvous, run.timeout_s, all_metrics=self._saves.own_policy)
        super().__init__(run, known, orbax)
        self._statistics = StatisticsLog(logger, continuous=self._saves.continuous)
        self._handler_error: Exception | None = None  # of a user's handler, in a save that was to be asynchronous
        run.open(given)
        self.reload()

    # Questions (the others: StepQuestions).

    def reached_preemption(self, step: int) -> bool:
        if self._orbax.read_only:  # an agent is for saving
            return self._run.rendezvous.preempted(arguments.step(step))
        return self._run.agent().reached_preemption(step)

    def should_save(self, step: int) -> bool:
        """By Orbax's rules. A `save_decision_policy` may go by the clock, or by whether a save is in progress: process
        0 says for all, a broadcast for each step that is asked about."""
        agent = self._run.writer
        if self._orbax.read_only or not self._known.is_new(step, agent):
            return False
        preempted = self.reached_preemption(step)

        def due() -> bool:
            saving = self.is_saving_in_progress()
            return self._saves.due(orbax_options.now(step), self._known.infos, saving=saving, preempted=preempted)

        return self._run.agreed(f"save step {step}?", due) if self._saves.own_policy else due()

    # Saving.

    def save(
        self,
        step: int,
        items: Any = None,
        save_kwargs: Any = None,
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
        args: Any = None,
        custom_metadata: Mapping[str, Json] | None = None,
    ) -> bool:
        """Save `step` if it is due or forced. True if a save has started; it goes on in the background.

        A failed save is logged and the next due step is tried; it does not end the loop. Raises UsageError naming the
        item that cannot be saved here, StepAlreadyExistsError, Fenced if a newer incarnation has taken over.
        """
        statistics = SaveStatistics(step, directory=str(self.directory))
        args = self._items.from_legacy(items, save_kwargs, args, "Save")
        self.check_for_errors()
        if self._orbax.read_only:
            return False
        self._items.check(args, f"step {step}")
        if not (force or self.should_save(step)):
            return False
        if step in self._known:
            self.wait_until_finished()  # perhaps it has failed, or retention let it go: then it may be saved again
            self.reload()
            if step not in self._known and self._run.writer:
                self._run.writer.forget(step)
        if step in self._known:
            raise orbax_api.step_exists(f"{self._run.url}: step {step} is there already; it is not overwritten")
        numbers, all_metrics = nested_metrics.split(None if self._orbax.prevent_write_metrics else metrics)
        try:
            contents = orbax_items.contents(args, self._items)
        except orbax_items.HandlerFailed as failed:
            return self._handler_failed(failed)
        extra = contents.extra(custom_metadata, all_metrics)
        self._items.single = contents.single
        agent = self._run.agent()
        statistics.waited_from(agent.settle(), self._run.last_commit)
        try:
            started = agent.save(
                step,
                contents.state,
                metrics=numbers,
                extra=extra,
                process_state=contents.process_state,
                force=True,
            )
        finally:  # it goes on, too, where a Ctrl-C has come in between
            self._known.forget(agent.failed_step)
            if agent.saved_step == step:
                self._known.begin(int(step), numbers)
        statistics.blocked_until_now()
        if started:
            self._statistics.log(statistics)
        return started

    def _handler_failed(self, failed: orbax_items.HandlerFailed) -> bool:
        """As in Orbax, what a handler raises in an asynchronous save comes at the next call."""
        error = failed.error
        if not self._orbax.enable_async_checkpointing:
            raise error
        self._handler_error = error
        return True

    def wait_until_finished(self) -> None:
        self._raise_handler_error()
        agent = self._run.writer
        if agent:
            try:
                agent.wait_until_finished()
            finally:
                self._known.forget(agent.failed_step)
            self._run.wait_for_views()

    def check_for_errors(self) -> None:
        """Raises what an ended save has left to raise (Fenced, an error of a user's handler). A failed save is logged
        instead."""
        self._raise_handler_error()
        agent = self._run.writer
        if agent and not self.is_saving_in_progress():
            agent.wait_until_finished()

    def _raise_handler_error(self) -> None:
        error = self._handler_error
        if error is not None:
            if threading.current_thread() is threading.main_thread():  # others may wait, too, and hear of it
                self._handler_error = None
            raise error

    def delete(self, step: int) -> None:
        """Retire a step; its data is deleted in the background. The newest one, too: the run is then rolled back to the
        one before; after the only one, a job begins anew. Raises NoSuchStep, and UsageError for a pinned one."""
        if self._orbax.read_only:
            logging.warning("%s is read only: step %s is not deleted", self._run.url, step)
            return
        self.wait_until_finished()
        self._run.meet(f"delete step {step}?")  # a process that is behind may yet ask whether the step is there
        self._run.delete(step)
        self._known.forget(step)

    def close(self) -> None:
        self._raise_handler_error()
        if self._run.writer:
            self._run.writer.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run.writer:
            self._run.writer.__exit__(kind, value, trace)

    # Restoring.

    def restore(
        self,
        step: int | None = None,
        items: Any = None,
        restore_kwargs: Any = None,
        directory: str | os.PathLike[str] | None = None,
        args: Any = None,
    ) -> Any:
        """The state of `step`: the tree, or a Composite by item. `step=None`: the newest good one; a damaged newest
        step is then quarantined and the one before is taken. A given step that is damaged raises Damaged.

        Raises NoSuchStep (a FileNotFoundError), NothingToRestore where all steps are quarantined, Mismatch naming each
        leaf that does not fit.
        """
        if directory is not None and os.fspath(directory) != self._run.url:
            options = orbax_api.public("CheckpointManagerOptions")(read_only=True)
            other = type(self)(directory, options=options)
            other._items = self._items
            return other.restore(step, items, restore_kwargs, args=args)
        statistics = RestoreStatistics(step, directory=str(self.directory))
        self.wait_until_finished()
        run, start = self._run, time.time()
        stored = run.stored.newest_readable() if step is None else run.stored.items(run.stored.find(step))
        if self._items.single is None:
            self._items.single = stored.single
        args = self._items.from_legacy(items, restore_kwargs, args, "Restore")
        restored = restore_items(
            run.store,
            run.rendezvous,
            step,
            stored.named(args, run.url),
            stored,
            handlers=self._items,
            record=not self._orbax.read_only,
            timeout_s=run.timeout_s,
        )
        statistics.restored_since(start)
        self._statistics.log(statistics)
        return stored.joined(restored)

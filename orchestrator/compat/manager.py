"""A CheckpointManager with Orbax's (0.12.8) methods, arguments and results, kept by an agent. Its face: `compat`.

A facade: what is stored is in `stored_steps`, what Orbax's policies are told in `known_steps`, options and items in
`orbax_options` and `orbax_items`. What has no counterpart here is rejected by name, when the manager is made or the
item is saved. Main thread, all processes in the same order, as with `Agent`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from absl import logging

from orchestrator import policy
from orchestrator.agent import Agent
from orchestrator.arrays.format import orbax_api
from orchestrator.compat import orbax_items, orbax_options
from orchestrator.compat.known_steps import KnownSteps
from orchestrator.compat.restore_items import restore_items
from orchestrator.compat.stored_steps import ManagedRootMetadata, StoredSteps
from orchestrator.errors import UsageError
from orchestrator.job.rendezvous import connect
from orchestrator.job.rounds import Round, agree
from orchestrator.job.startup import agree_at_start
from orchestrator.job.takeover import Takeover
from orchestrator.rules import arguments, configuration, journal
from orchestrator.rules.records import Head, Json
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_directory import unadopted
from orchestrator.storage import open_storage
from orchestrator.storage.port import Storage
from orchestrator.storage.read_only import ReadOnlyStorage


class CheckpointManager:
    """As `orbax.checkpoint.CheckpointManager`. The run is an ordinary one: `orchestrator ls`, `oc.open_run` and
    `oc.Agent` work on it.

    The first `save` opens an epoch: from then on an older incarnation of the job cannot commit.
    With `read_only=True` nothing is ever written, whichever method is called: as in Orbax, `save` returns False and
    `delete` does nothing; `restore` steps down past damaged steps and leaves them as they are.
    Raises UsageError for options and handlers that have no counterpart, and for a directory that holds Orbax's own
    steps and has not been adopted.
    """

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
        self._orbax = options or orbax_api.public("CheckpointManagerOptions")()
        orbax_options.check(self._orbax, orbax_api.public("CheckpointManagerOptions")())
        self._handlers = orbax_items.handler_kinds(checkpointers if item_handlers is None else item_handlers)
        self._options = orbax_options.ours(self._orbax)
        self._saves = orbax_api.Saves(self._orbax)
        self._url = os.fspath(directory)
        store = open_storage(self._url)
        self._storage: Storage = ReadOnlyStorage(store) if self._orbax.read_only else store
        self._store = JournalStore(self._storage, writer="compat")
        timeout_s = self._options.rendezvous_timeout_s
        self._rendezvous = connect(timeout_s)
        self._root_metadata = {
            name: arguments.plain_json(f"metadata[{name!r}]", value) for name, value in (metadata or {}).items()
        }
        self._kept_root_metadata: dict[str, Json] | None = None
        self._agent: Agent | None = None
        self._stored = StoredSteps(self._store)
        # Only a policy of the user's own may look at the metrics of the steps before.
        own_policy = self._orbax.save_decision_policy is not None
        self._known = KnownSteps(self._stored, self._rendezvous, timeout_s, all_metrics=own_policy)
        if not self._orbax.read_only:
            Takeover(self._storage, self._rendezvous).wait()
        given = configuration.of_orbax(self._orbax)
        agree_at_start(self._store, self._rendezvous, "open the directory", given, timeout_s, self._admit)
        self.reload()

    def _admit(self, head: Head | None) -> None:
        if rejection := unadopted(self._store, head):
            raise UsageError(rejection)

    # Questions.

    @property
    def directory(self) -> Any:
        return orbax_api.path(self._url)

    def all_steps(self, read: bool = False) -> list[int]:
        """Steps that can be restored, and the one that is being saved."""
        steps = {live.step for live in self._stored.restorable()}
        in_flight = self._in_flight
        return sorted(steps if in_flight is None else {*steps, in_flight})

    def latest_step(self) -> int | None:
        """The step committed last, or the one that is being saved; None in a new run. Raises NothingToRestore where
        all steps are quarantined: a loop that asks this would take None for a new run."""
        in_flight = self._in_flight
        return self._stored.latest() if in_flight is None else in_flight

    def best_step(self) -> int | None:
        if self._orbax.best_fn is None:
            return self.latest_step()
        infos = [orbax_options.info(*each) for each in self._stored.infos(all_metrics=True)]
        return orbax_options.best(infos, self._orbax.best_fn, self._orbax.best_mode)

    def reload(self) -> None:
        """Read the steps again; all processes then know the same (process 0's)."""
        self._known.reload()

    def reached_preemption(self, step: int) -> bool:
        if self._orbax.read_only:  # an agent is for saving
            return self._rendezvous.preempted(arguments.step(step))
        return self._writer().reached_preemption(step)

    def should_save(self, step: int) -> bool:
        if self._orbax.read_only or not self._known.is_new(step, self._agent):
            return False
        preempted = self.reached_preemption(step)
        candidate = orbax_options.info(step, 0.0, None)
        saving = self.is_saving_in_progress()
        return self._saves.due(candidate, self._known.infos, saving=saving, preempted=preempted)

    def is_saving_in_progress(self) -> bool:
        return self._in_flight is not None

    def metrics(self, step: int) -> dict[str, float] | None:
        return self._stored.metrics(self._stored.find(step)) or None

    def item_metadata(self, step: int) -> Any:
        """Abstract arrays in the structure of what was saved; a Composite of them for several items."""
        return self._stored.items(self._stored.find(step)).skeletons()

    def metadata(self, step: int | None = None) -> Any:
        if step is not None:
            return self._stored.metadata(step)
        return ManagedRootMetadata(self._kept_root_metadata or self._stored.root_metadata(self._root_metadata))

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
        args = orbax_items.from_legacy(items, save_kwargs, args, self._handlers, "Save")
        if self._orbax.read_only or not (force or self.should_save(step)):
            return False
        if step in self._known:
            self.wait_until_finished()  # perhaps it has failed: then it may be tried again
            self.reload()
        if step in self._known:
            raise orbax_api.step_exists(f"{self._url}: step {step} is there already; it is not overwritten")
        if self._kept_root_metadata is None:  # what process 0 stores counts
            found = self._stored.root_metadata(self._root_metadata) if self._rendezvous.process == 0 else {}
            self._kept_root_metadata = found
        contents = orbax_items.contents(args)
        agent = self._writer()
        try:
            return agent.save(
                step,
                contents.state,
                metrics=None if self._orbax.prevent_write_metrics else metrics,
                extra=contents.extra(custom_metadata, self._kept_root_metadata),
                process_state=contents.process_state,
                force=True,
            )
        finally:  # it goes on, too, where a Ctrl-C has come in between
            self._known.forget(agent.failed_step)
            if agent.saved_step == step:
                self._known.begin(int(step), metrics)

    def wait_until_finished(self) -> None:
        if self._agent:
            try:
                self._agent.wait_until_finished()
            finally:
                self._known.forget(self._agent.failed_step)

    def check_for_errors(self) -> None:
        """Raises what an ended save has left to raise (Fenced). A failed save is logged instead."""
        if self._agent and not self.is_saving_in_progress():
            self._agent.wait_until_finished()

    def delete(self, step: int) -> None:
        """Retire a step; its data is deleted in the background. Raises NoSuchStep, and UsageError for a step that is
        never retired: the newest one, the newest one known to be good, a pinned one."""
        if self._orbax.read_only:
            logging.warning("%s is read only: step %s is not deleted", self._url, step)
            return
        self.wait_until_finished()
        self._stored.find(step)
        rule = partial(journal.retire, keep=orbax_options.KeepAllBut(step))

        def retire() -> bool:
            head = self._store.append(rule)
            return head is None or journal.find(head, step) is None

        retired = Round[bool](f"delete step {step}", bool)
        if not agree(self._rendezvous, retired, self._options.rendezvous_timeout_s, retire):
            raise UsageError(
                f"{self._url}: step {step} stays: it is the newest, the newest known to be good, or pinned"
            )
        self._known.forget(step)

    def close(self) -> None:
        if self._agent:
            self._agent.close()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._agent:
            self._agent.__exit__(kind, value, trace)

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
        if directory is not None and os.fspath(directory) != self._url:
            raise UsageError(f"restore(directory={os.fspath(directory)!r}): make a CheckpointManager of that directory")
        self.wait_until_finished()
        args = orbax_items.from_legacy(items, restore_kwargs, args, self._handlers, "Restore")
        stored = self._stored.newest_readable() if step is None else self._stored.items(self._stored.find(step))
        restored = restore_items(
            self._store,
            self._rendezvous,
            step,
            stored.named(args, self._url),
            stored,
            record=not self._orbax.read_only,
            timeout_s=self._options.rendezvous_timeout_s,
        )
        return stored.joined(restored)

    @property
    def _in_flight(self) -> int | None:
        return self._agent.in_flight if self._agent else None

    def _writer(self) -> Agent:
        if self._agent is None:
            keep = orbax_options.KeepAsOrbax(orbax_api.Keeps(self._orbax))
            self._agent = Agent(
                self._url,
                save=policy.at(()),
                keep=keep,
                options=self._options,
                rendezvous=self._rendezvous,
                storage=self._storage,
            )
        return self._agent

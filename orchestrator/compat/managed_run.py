"""The run behind a CheckpointManager: its stores, the agent that saves, and the directories beside it that Orbax would
have made. Main thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from orchestrator import policy
from orchestrator.agent import Agent
from orchestrator.arrays.format import orbax_api
from orchestrator.compat import orbax_options, root_metadata
from orchestrator.compat.step_views import StepViews
from orchestrator.compat.store_directory import StoreDirectory
from orchestrator.compat.stored_steps import NoSuchNamedStep, NoSuchStep, StoredSteps
from orchestrator.errors import UsageError
from orchestrator.job.rendezvous import connect
from orchestrator.job.rounds import Round, agree
from orchestrator.job.startup import agree_at_start
from orchestrator.job.takeover import Takeover
from orchestrator.rules import configuration, removal
from orchestrator.rules.records import Head, Json
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.orbax_directory import unadopted
from orchestrator.storage import local_path, open_storage
from orchestrator.storage.port import Storage
from orchestrator.storage.read_only import ReadOnlyStorage


class ManagedRun:
    """writer: the agent, once something was saved or asked of it. on_commit: by step, called on the save's thread once
    it is committed. last_commit: when that was last. Raises UsageError for options without counterpart.

    `single`: the run is one checkpoint. A failed save raises then, and Orbax's directories are at the root itself."""

    def __init__(self, url: str, options: Any, *, single: bool = False) -> None:
        self.url, self._orbax = url, options
        self._options = replace(orbax_options.ours(options), on_save_failure="raise" if single else "warn")
        self.timeout_s = self._options.rendezvous_timeout_s
        store = open_storage(url)
        self._storage: Storage = ReadOnlyStorage(store) if options.read_only else store
        self.store = JournalStore(self._storage, writer="compat")
        self.rendezvous = connect(self.timeout_s)
        defaults = orbax_api.public("CheckpointManagerOptions")()
        in_store = local_path(url) is None
        orbax_options.check(options, defaults, self.rendezvous.count, in_store=in_store)
        self.stored = StoredSteps(self.store, NoSuchNamedStep if options.step_name_format else NoSuchStep)
        self._views = StepViews(self.store, self.stored, options, single=single)
        self.directory = StoreDirectory(url) if in_store else orbax_api.path(url)
        self.writer: _ManagedAgent | None = None
        self.on_commit: dict[int, Callable[[], None]] = {}
        self.last_commit: float | None = None
        self._given: dict[str, Json] = {}

    def open(self, given: dict[str, Json]) -> None:
        """Compare with the other processes, and with what is there. A collective. `given`: root metadata."""
        if not self._orbax.read_only:
            Takeover(self._storage, self.rendezvous).wait()
        about = configuration.of_orbax(self._orbax)
        agree_at_start(self.store, self.rendezvous, "open the directory", about, self.timeout_s, self._admit)
        self._given = given
        if not self._orbax.read_only:
            # Asked of process 0: once the others go on, the directories that it makes are there.
            self.agreed("prepare the directory", self._prepare)

    def _admit(self, head: Head | None) -> None:
        if rejection := unadopted(self.store, head):
            raise UsageError(rejection)

    def _prepare(self) -> bool:
        if self._orbax.create and (root := local_path(self.url)) is not None:
            os.makedirs(root, exist_ok=True)
        kept = self._given and self._orbax.save_root_metadata and not self.stored.older_root_metadata()
        if kept and root_metadata.read(self._storage) is None:
            root_metadata.keep(self._storage, self._given)
        self._views.refresh()
        return True

    def root_metadata(self) -> Any:
        found = root_metadata.read(self._storage)
        if found is None:
            found = self.stored.older_root_metadata()
        if not found and self._orbax.read_only:
            found = dict(self._given)
        return orbax_api.public("metadata").RootMetadata(custom_metadata=found)

    def meet(self, name: str) -> None:
        """Return once all processes have come here. A collective."""
        self.rendezvous.gather(name, None, self.timeout_s)

    def agreed(self, name: str, answer: Callable[[], bool]) -> bool:
        """Process 0's answer. A collective."""
        return agree(self.rendezvous, Round[bool](name, bool), self.timeout_s, answer)

    def agent(self) -> _ManagedAgent:
        if self.writer is None:
            keep = orbax_options.KeepAsOrbax(orbax_api.Keeps(self._orbax))
            self.writer = _ManagedAgent(
                self.url,
                save=policy.at(()),
                keep=keep,
                options=self._options,
                rendezvous=self.rendezvous,
                storage=self._storage,
            )
            self.writer.after_commit = self._after_commit
        return self.writer

    def _after_commit(self) -> None:
        self.last_commit = time.time()
        if self.rendezvous.process == 0:
            self._views.refresh()
        callback = getattr(self._orbax.async_options, "post_finalization_callback", None)
        if callback is not None:
            callback()
        step = self.writer.in_flight if self.writer else None
        if step is not None and (listener := self.on_commit.pop(step, None)):
            listener()

    def delete(self, step: int) -> None:
        """Retire `step`, whichever it is. A collective. Raises NoSuchStep, UsageError for one that has to stay."""
        epoch = self.writer.epoch if self.writer else None
        rule = partial(removal.remove, step=step, epoch=epoch)

        def remove() -> tuple[str, str]:
            # Asked on process 0 alone: once it has removed the step, those behind it would not find it.
            try:
                self.stored.find(step)
                self.store.append(rule)
            except NoSuchStep as error:
                return str(error), ""
            except UsageError as error:
                return "", str(error)
            self._views.refresh()
            return "", ""

        asked = Round[tuple[str, str]](f"delete step {step}", tuple[str, str])
        missing, stays = agree(self.rendezvous, asked, self.timeout_s, remove)
        if missing:
            raise self.stored.missing(missing)
        if stays:
            raise UsageError(f"{self.url}: {stays}")
        if self.writer:
            self.writer.forget(step)

    def wait_for_views(self) -> None:
        """Until the directories that process 0 makes are there for this process, too, as after a save of Orbax's. Not a
        collective; bounded."""
        if not self._orbax.read_only and self.rendezvous.process != 0:
            self._views.wait_for_newest()


class _ManagedAgent(Agent):
    """Brings the directories beside the run up to date before the data of retired steps is deleted."""

    after_commit: Callable[[], None] = staticmethod(lambda: None)

    def _committed(self) -> None:
        try:
            self.after_commit()
        finally:  # a callback of the user's may fail
            super()._committed()

    def settle(self) -> float:
        """Wait for the save before, as `save` does. Returns since when, on the wall clock."""
        start = time.time()
        self._saves.settle()
        return start

    def forget(self, step: int) -> None:
        """`step` has been deleted from the run: it may be saved again. All processes."""
        self._schedule.forget(step)

"""A run for those who only read it, as evaluators and notebooks do: `open_run`, and the `Run` that it returns.

A reader meets no other process and writes nothing. Of `job/` it imports only `read_step`, which is about one process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from orchestrator.errors import (
    Damaged,
    NothingToRestore,
    OrchestratorError,
    StepNotFound,
    StepRetired,
    StorageError,
    UnsafeKey,
)
from orchestrator.job.read_step import ReadOptions, Restored, candidates, listed, read_step, read_stored
from orchestrator.observe.events import HeldStepDropped, SteppedDown, emit
from orchestrator.observe.progress_lines import telling
from orchestrator.rules import arguments, held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import LiveStep
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import held_steps, tier_directory
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage
from orchestrator.storage.read_only import ReadOnlyStorage

_RETIRED_MAX = 100  # times that retention may be quicker than a reader who wants the newest step


def open_run(root: str | os.PathLike[str], *, tiers: Sequence[MemoryTier] = (), progress: bool | None = None) -> Run:
    """Open a run for reading. Writes nothing. `tiers`: as the job's; `restore` then takes a newer step that is held
    whole on this machine, or the `step` asked for, if the store does not have it. `progress`: of long restores, as
    `Options.progress`. Raises NotARun, Damaged, NewerFormat."""
    if progress is not None:
        arguments.flag("progress", progress)
    tier = tier_directory.chosen(tiers)
    return Run(JournalStore(ReadOnlyStorage(open_storage(root)), writer="reader"), progress, tier)


class Run:
    """A run opened for reading (evaluators, notebooks): no epoch is opened and nothing is ever written."""

    def __init__(self, store: JournalStore, progress: bool | None = None, tier: MemoryTier | None = None) -> None:
        self._store, self._progress, self._tier = store, progress, tier
        self._reported: set[int] = set()  # steps that this object has told the user of
        store.require_head()

    def __repr__(self) -> str:
        return f"<Run {self._store.url}, read-only>"

    def latest_step(self) -> int | None:
        """The newest restorable step; None in a new run. Raises NothingToRestore where all steps are quarantined."""
        live = self._store.find(None)
        self._reported.update([live.step] if live else [])
        return live.step if live else None

    def all_steps(self) -> list[int]:
        steps = sorted(live.step for live in self._store.require_head().live if live.restorable)
        self._reported.update(steps)
        return steps

    def restore(
        self,
        like: Any = None,
        *,
        step: int | None = None,
        partial: bool = False,
        cast: bool = False,
        attest: bool = False,
    ) -> Restored:
        """Read a step (the newest by default) into `like`; None gives nested dicts of numpy arrays.

        Steps down past damaged steps without writing that to the journal; not past one that cannot be read now. The
        newest is looked for again if retention was quicker. `attest`: compare fingerprints with those of the save, of
        arrays that are wholly in this process. Raises NothingToRestore, Mismatch, Unavailable, and of a step that was
        asked for StepNotFound, StepRetired (it was there when this reader has heard of it), Damaged.
        """
        options = ReadOptions(partial=partial, cast=cast, attest=attest)
        step = arguments.saved_step(step)
        with telling(self._progress):
            return self._restore(like, step, options)

    def _restore(self, like: Any, step: int | None, options: ReadOptions) -> Restored:
        in_store = step is not None and journal.find(self._store.require_head(), step) is not None
        if self._tier and not in_store and (restored := self._held(self._tier, step, like, options)):
            return restored
        if step is not None:
            return read_step(self._store, self._find(step), like, options)
        damaged: dict[AttemptId, str] = {}
        retired = 0
        while True:
            live = self._newest(damaged)
            try:
                return read_step(self._store, live, like, options)
            except StepRetired:
                retired += 1
                if retired > _RETIRED_MAX:
                    raise
            except Damaged as error:
                emit(SteppedDown(live.step, live.attempt, str(error)))
                damaged[live.id] = str(error)

    def _held(self, tier: MemoryTier, step: int | None, like: Any, options: ReadOptions) -> Restored | None:
        """The newest held step that is newer than what the store has, and whole; or `step`, as it was held last."""
        try:
            run = tier_directory.identity(self._store)
            paths = tier_directory.processes(tier.directory, run) if run else []
        except OrchestratorError as error:  # what the store has can be read all the same
            logging.warning("no held step is looked for: %s", error)
            return None
        if not paths:
            return None
        steps = held_steps.on_this_host(paths[0], paths)
        standing, whole = held.standing(self._store.require_head()), steps.offers()
        chosen = held.candidates(standing, [whole]) if step is None else held.asked_for(standing, whole, step)
        for offer in chosen:
            try:
                stored = steps.step(offer)
                if problem := held_steps.not_of_this_journal(self._store, stored.manifest):
                    emit(HeldStepDropped(offer.step, offer.attempt, problem))
                    continue
                return read_stored(stored, like, options)
            except (Damaged, UnsafeKey, StorageError, StepRetired) as error:
                emit(HeldStepDropped(offer.step, offer.attempt, str(error)))
        return None

    def _find(self, step: int) -> LiveStep:
        try:
            live = self._store.find(step)
        except StepNotFound as error:
            if step in self._reported:
                raise StepRetired(f"{error}; it was retired") from error
            raise
        assert live is not None  # find raises for a step that is not there
        return live

    def _newest(self, damaged: dict[AttemptId, str]) -> LiveStep:
        head = self._store.require_head()
        if self._store.newest(head) is None:
            raise NothingToRestore(f"{self._store.url}: nothing to restore: no step has been committed yet")
        good = candidates(head, damaged)
        if not good:
            raise NothingToRestore(f"{self._store.url}: nothing to restore" + listed(damaged))
        return good[-1]

    def watch(self, *, poll_s: float = 1.0, timeout_s: float | None = None) -> Iterator[int]:
        """Yield steps committed from now on, each once. Ends after `timeout_s` without a new one (None: never).

        Retention may retire a step between its being yielded and its being restored: `restore(step=...)` raises
        StepRetired then, and a newer one comes.
        """
        arguments.seconds("poll_s", poll_s)
        if timeout_s is not None:
            arguments.seconds("timeout_s", timeout_s)
        seen = {live.id for live in self._store.require_head().live}
        return self._watch(seen, poll_s, timeout_s)

    def _watch(self, seen: set[AttemptId], poll_s: float, timeout_s: float | None) -> Iterator[int]:
        quiet_since = time.monotonic()
        while timeout_s is None or time.monotonic() - quiet_since < timeout_s:
            fresh = [live for live in self._store.require_head().live if live.id not in seen]
            for live in fresh:
                seen.add(live.id)
                self._reported.add(live.step)
                yield live.step
                quiet_since = time.monotonic()
            if not fresh:
                time.sleep(poll_s)

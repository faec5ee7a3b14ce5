"""A run for those who only read it: evaluators, notebooks, `open_run`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from orchestrator.errors import Damaged, NothingToRestore, StepNotFound, StepRetired
from orchestrator.job.restore import Reading, RestoreArgs, Restored, fit, shown
from orchestrator.observe.events import SteppedDown, emit
from orchestrator.rules import arguments
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import LiveStep
from orchestrator.run.journal_store import Catalog
from orchestrator.run.stored_step import StoredStep

_RETIRED_MAX = 100  # times that retention may be quicker than a reader who wants the newest step


def read_step(
    catalog: Catalog, live: LiveStep, like: Any, args: RestoreArgs, reading: Reading | None = None
) -> Restored:
    """Restore exactly this attempt into `like`'s structure, shapes, dtypes and shardings: see `restore.fit`.

    Raises Mismatch before any array is read, Damaged, StepRetired, Unavailable.
    """
    stored = StoredStep(catalog, live)
    restored, proof = fit(stored, like, args).read((reading or Reading(args.reader)).load)
    if proof.wrong_here:
        names = [name for name, _ in proof.wrong_here]
        text = "; ".join(line for _, line in proof.wrong_here[:5])
        stored.judge_fingerprints(names, text)
    return restored


class Run:
    """A run opened for reading (evaluators, notebooks): no epoch is opened and nothing is ever written."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._shown: set[int] = set()  # steps that the user has heard of from us
        catalog.require_head()

    def latest_step(self) -> int | None:
        """The newest restorable step; None in a new run. Raises NothingToRestore where all steps are quarantined."""
        live = self._catalog.find(None)
        self._shown.update([live.step] if live else [])
        return live.step if live else None

    def all_steps(self) -> list[int]:
        steps = sorted(live.step for live in self._catalog.require_head().live if live.restorable)
        self._shown.update(steps)
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
        args = RestoreArgs(partial=partial, cast=cast, attest=attest)
        step = arguments.saved_step(step)
        if step is not None:
            return read_step(self._catalog, self._find(step), like, args)
        passed: dict[AttemptId, str] = {}
        retired = 0
        while True:
            live = self._newest(passed)
            try:
                return read_step(self._catalog, live, like, args)
            except StepRetired:
                retired += 1
                if retired > _RETIRED_MAX:
                    raise
            except Damaged as error:
                emit(SteppedDown(live.step, live.attempt, str(error)))
                passed[live.id] = str(error)

    def _find(self, step: int) -> LiveStep:
        try:
            live = self._catalog.find(step)
        except StepNotFound as error:
            if step in self._shown:
                raise StepRetired(f"{error}; it was retired") from error
            raise
        assert live is not None  # find raises for a step that is not there
        return live

    def _newest(self, passed: dict[AttemptId, str]) -> LiveStep:
        head = self._catalog.require_head()
        if self._catalog.newest(head) is None:
            raise NothingToRestore(f"{self._catalog.url}: nothing to restore: no step has been committed yet")
        good = [live for live in head.live if live.restorable and live.id not in passed]
        if not good:
            raise NothingToRestore(f"{self._catalog.url}: nothing to restore" + shown(passed))
        return good[-1]

    def watch(self, *, poll_s: float = 1.0, timeout_s: float | None = None) -> Iterator[int]:
        """Yield steps committed from now on, each once. Ends after `timeout_s` without a new one (None: never).

        Retention may retire a step between its being yielded and its being restored: `restore(step=...)` raises
        StepRetired then, and a newer one comes.
        """
        arguments.seconds("poll_s", poll_s)
        if timeout_s is not None:
            arguments.seconds("timeout_s", timeout_s)
        seen = {live.id for live in self._catalog.require_head().live}
        return self._watch(seen, poll_s, timeout_s)

    def _watch(self, seen: set[AttemptId], poll_s: float, timeout_s: float | None) -> Iterator[int]:
        quiet_since = time.monotonic()
        while timeout_s is None or time.monotonic() - quiet_since < timeout_s:
            fresh = [live for live in self._catalog.require_head().live if live.id not in seen]
            for live in fresh:
                seen.add(live.id)
                self._shown.add(live.step)
                yield live.step
                quiet_since = time.monotonic()
            if not fresh:
                time.sleep(poll_s)

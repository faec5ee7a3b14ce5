"""What a run's memory tiers hold on this machine, for `ls` and `watch`. Reads only."""

from __future__ import annotations

import os
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Result
from orchestrator.errors import OrchestratorError
from orchestrator.rules import held
from orchestrator.rules.records import Head
from orchestrator.run import held_steps, tier_directory
from orchestrator.run.journal_store import JournalStore

_REASON_CHARS = 200


class HeldNow(Result, frozen=True):
    """A step in memory tiers of this machine. `newer`: than all that the store has, so that a restore takes it.
    `problem`: why it cannot; '' if all of it is here."""

    step: int
    attempt: str
    time: float
    bytes: int
    newer: bool
    problem: str


class HeldHere:
    """Of one run, looked at again and again."""

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._run: str | None = None

    def now(self, head: Head) -> tuple[HeldNow, ...]:
        """Newest first. A tier that cannot be looked at holds nothing as far as this goes. Makes no request of the
        store where this machine has no tiers at all."""
        try:
            if self._run is None:
                if not os.path.isdir(os.path.dirname(tier_directory.of_run(None, "any"))):
                    return ()
                self._run = tier_directory.identity(self._store)
            return _look(self._run, head) if self._run else ()
        except OrchestratorError:
            return ()


def _look(run: str, head: Head) -> tuple[HeldNow, ...]:
    paths = tier_directory.processes(None, run)
    if not paths:
        return ()
    found, standing = held_steps.on_this_host(paths[0], paths), held.standing(head)
    found.offers()
    rows = [
        HeldNow(
            step=live.step,
            attempt=live.attempt,
            time=live.time,
            bytes=live.bytes,
            newer=standing.admits(live.id),
            problem=found.faults.get(live.id, ""),
        )
        for live in sorted(found.listed.values(), key=lambda live: held.rank(live.id), reverse=True)
    ]
    return tuple(rows)


def lines(found: tuple[HeldNow, ...], now: float) -> Iterator[tuple[str, render.Tone]]:
    """For people: one for each step."""
    taken = next((one for one in found if one.newer and not one.problem), None)
    for one in found:
        about = f"step {one.step} held in memory {render.age(now - one.time)}, {render.size(one.bytes)}"
        if one.problem:
            yield f"{about}; cannot be restored: {one.problem[:_REASON_CHARS]}", "warn"
        elif one is taken:
            yield f"{about}; a restart on this machine takes it", "good"
        elif one.newer:
            yield about, "plain"
        else:
            yield f"{about}; the store has a newer one", "dim"

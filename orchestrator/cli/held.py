"""What a run's memory tiers hold on this machine, for `ls`, `watch` and `doctor`. Reads only."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from orchestrator.cli import render
from orchestrator.cli.command import Result
from orchestrator.errors import OrchestratorError
from orchestrator.rules import held, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held_files import names, writer_of
from orchestrator.rules.placement import Placement
from orchestrator.rules.records import Head, LiveStep
from orchestrator.run import held_steps, tier_directory
from orchestrator.run.checked_reads import record
from orchestrator.run.held_steps import HeldSteps
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import PosixStorage

_REASON_CHARS = 200
_HOSTS = 4  # named, of those that hold a step


class HeldNow(Result, frozen=True):
    """A step in memory tiers. `newer`: than all that the store has, so that a restore takes it. `parts`: the processes
    whose parts, or copies of them, are whole on this machine. `hosts`: all that hold parts of it, as this machine was
    told when they began; `copies`: of each part. `survives`: what may be lost of them. `problem`: why it cannot be
    restored from this machine alone, '' if it can: that matters where `hosts` is this one."""

    step: int
    attempt: str
    time: float
    bytes: int
    newer: bool
    problem: str
    parts: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    copies: int = 0
    survives: str = ""

    @property
    def is_lost(self) -> bool:
        """As far as this machine can tell."""
        return bool(self.problem) and len(self.hosts) < 2


@dataclass(frozen=True)
class Chosen:
    """The step that a restore would take. in_memory: whether it lies in tiers; placed: on which hosts, if anybody has
    written that down here."""

    stored: StoredStep
    in_memory: bool = False
    placed: Placement | None = None


class HeldHere:
    """Of one run, looked at again and again."""

    def __init__(self, store: JournalStore) -> None:
        self._store = store
        self._run: str | None = None
        self._ours: set[AttemptId] = set()  # held steps of this very run: that needs a request of the store once

    def now(self, head: Head) -> tuple[HeldNow, ...]:
        """Newest first. A tier that cannot be looked at holds nothing as far as this goes. Makes no request of the
        store where this machine has no tiers at all."""
        try:
            paths = self.paths()
            return self._look(paths, head) if paths else ()
        except OrchestratorError:
            return ()

    def choose(self, step: int | None) -> Chosen | None:
        """What a restore would take from memory, of steps whose records are on this machine; None if it takes one from
        the store, and nothing of that is in memory."""
        try:
            if not (paths := self.paths()):
                return None
            found, head = held_steps.on_this_host(paths[0], paths), self._store.require_head()
            placed, standing = placement(paths), held.standing(head)
            live = journal.find(head, step) if step is not None else journal.newest(head)
            wanted = [one for one in found.listed if live and one == held.offer(live)]
            if step is None:
                wanted = held.candidates(standing, [found.listed]) + wanted
            elif live is None:
                wanted = held.asked_for(standing, list(found.listed), step)
            ours = (one for one in wanted if not self._problem(found, found.listed[one]))
            for offer in itertools.islice(ours, 1):
                with contextlib.suppress(OrchestratorError):
                    stored = found.step(offer)
                    return Chosen(stored, bool(stored.intent and stored.receipts()), placed)
        except OrchestratorError:
            return None
        return None

    def paths(self) -> list[str]:
        """The directories of the run's processes on this machine. Raises Damaged, StorageError."""
        if self._run is None:
            if not os.path.isdir(os.path.dirname(tier_directory.of_run(None, "any"))):
                return []
            self._run = tier_directory.identity(self._store)
        return tier_directory.processes(None, self._run) if self._run else []

    def _look(self, paths: Sequence[str], head: Head) -> tuple[HeldNow, ...]:
        found, standing, placed = held_steps.on_this_host(paths[0], paths), held.standing(head), placement(paths)
        found.offers()
        rows = [
            HeldNow(
                step=live.step,
                attempt=live.attempt,
                time=live.time,
                bytes=live.bytes,
                newer=standing.admits(live.id),
                problem=self._problem(found, live),
                parts=tuple(_parts(found, live)),
                hosts=tuple(host.name for host in placed.hosts) if placed else (),
                copies=min((len(targets) for targets in placed.targets), default=0) if placed else 0,
                survives=placed.survives if placed else "",
            )
            for live in sorted(found.listed.values(), key=lambda live: held.rank(live.id), reverse=True)
        ]
        return tuple(rows)

    def _problem(self, found: HeldSteps, live: LiveStep) -> str:
        if live.id in found.faults:
            return found.faults[live.id]
        try:
            manifest = found.manifest(live)
            if live.id not in self._ours and (problem := held_steps.not_of_this_journal(self._store, manifest)):
                return problem
        except OrchestratorError as error:
            return str(error)
        self._ours.add(live.id)
        return ""


def placement(paths: Iterable[str]) -> Placement | None:
    """The newest that a process has recorded here: where the job holds steps now."""
    newest: Placement | None = None
    for path in paths:
        with contextlib.suppress(OrchestratorError):
            found = record(PosixStorage(path), keys.PLACEMENT, Placement)
            if found and (newest is None or found.time > newest.time):
                newest = found
    return newest


def _parts(found: HeldSteps, live: LiveStep) -> Iterator[int]:
    """The processes of whose files, or copies of them, all are here."""
    with contextlib.suppress(OrchestratorError):
        manifest = found.manifest(live)
        files, _ = found.files(live, manifest)
        here = {name for numbers in files.values() for number, name in enumerate(names(manifest)) if number in numbers}
        expected, got = Counter(map(writer_of, names(manifest))), Counter(map(writer_of, here))
        yield from sorted(process for process, count in expected.items() if got[process] == count)


def lines(found: tuple[HeldNow, ...], now: float) -> Iterator[tuple[str, render.Tone]]:
    """For people: one for each step."""
    taken = next((one for one in found if one.newer and not one.is_lost), None)
    for one in found:
        about = f"step {one.step} held in memory {render.age(now - one.time)}, {render.size(one.bytes)}{_where(one)}"
        if one.is_lost:
            yield f"{about}; cannot be restored: {one.problem[:_REASON_CHARS]}", "warn"
        elif one is taken:
            where = "of these hosts" if len(one.hosts) > 1 else "on this machine"
            yield f"{about}; a restart {where} takes it", "good"
        elif one.newer:
            yield about, "plain"
        else:
            yield f"{about}; the store has a newer one", "dim"


def _where(one: HeldNow) -> str:
    if len(one.hosts) < 2:
        return ""
    some = ", ".join(one.hosts[:_HOSTS]) + (f" and {len(one.hosts) - _HOSTS} more" if len(one.hosts) > _HOSTS else "")
    copies = "no copies" if not one.copies else "1 copy" if one.copies == 1 else f"{one.copies} copies"
    return f" on {some}, {copies}; may be lost: {one.survives}"

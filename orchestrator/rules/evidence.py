"""What proves that a journal has lost entries, and what may be made of the attempts that are left. Pure.

Intent, receipts and manifest say on which version of the head they build, an attempt's name says of which epoch it is,
and every 500th version has a marker. Whatever of these is above the head proves that entries are gone: of a copy that
broke off, of a directory that was left out. Nothing is opened, collected or overwritten then.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import Stamp, StoredAttempt
from orchestrator.rules.records import FORMAT, Event, Head, LiveStep


def lost(head: Head | None, found: Mapping[AttemptId, StoredAttempt], marker: int = -1) -> str:
    """What proves that entries above `head` are missing; '' if nothing does. `found` was listed before the head was
    read: an attempt is begun when the entry that opens its epoch is durable. `marker`: the newest one's version."""
    version, epoch = (head.version, head.epoch) if head else (-1, 0)
    if marker > version:
        return f"a marker in {keys.JOURNAL_INDEX} names version {marker}"
    for attempt, one in sorted(found.items(), reverse=True):
        if attempt.epoch > epoch:
            return f"{attempt.label} is of an epoch above {epoch}, the head's"
        if one.built_on > version and not (head and journal.is_known(head, attempt)):
            return f"{attempt.label} builds on version {one.built_on}"
    return ""


def holes(versions: Iterable[int]) -> list[tuple[int, int]]:
    """The versions that are missing between those that are there: (first, last) of each hole, in order."""
    pairs = itertools.pairwise(sorted(versions))
    return [(before + 1, after - 1) for before, after in pairs if after - before > 1]


@dataclass(frozen=True)
class Whole:
    """An attempt whose manifest and files are there. entry: as the journal would have it."""

    entry: LiveStep
    built_on: int = -1


@dataclass(frozen=True)
class Choice:
    """live: what a recovered head has, in commit order. added: those of them that the surviving head does not know.
    left_out: whole attempts that are not taken, with the reason."""

    live: tuple[LiveStep, ...]
    added: tuple[LiveStep, ...]
    left_out: tuple[tuple[LiveStep, str], ...]


def choose(head: Head | None, whole: Sequence[Whole], ended: Collection[AttemptId]) -> Choice:
    """What to make of the `whole` attempts. `ended`: those that any surviving entry calls retired, aborted or
    quarantined; they are never brought back. What the surviving `head` has stays as it is, pins and trust included, but
    for a step that was committed again after it."""
    added: dict[int, LiveStep] = {}
    left_out: list[tuple[LiveStep, str]] = []
    for one in sorted(whole, key=_order):
        attempt = one.entry.id
        if head and (journal.is_live(head, attempt) or journal.is_aside(head, attempt)):
            continue
        if attempt in ended:
            left_out.append((one.entry, "the journal calls it retired, aborted or quarantined"))
        elif head and journal.superseded(head, attempt):
            left_out.append((one.entry, "never committed, and the journal has a newer step"))
        else:
            if before := added.pop(attempt.step, None):
                left_out.append((before, f"saved again as {attempt.name}"))
            added[attempt.step] = one.entry
    old = head.live if head else ()
    pins = {live.step: live.pins for live in old}
    new = tuple(replace(live, pins=pins.get(step, ())) for step, live in added.items())
    # A quarantined attempt stays the step's only if nothing else is: else it is put aside (`recovered`).
    return Choice((*(live for live in old if live.step not in added), *new), new, tuple(left_out))


def _order(one: Whole) -> tuple[int, int, int, int]:
    """Commit order, as far as the records tell it."""
    attempt = one.entry.id
    return attempt.epoch, one.built_on, attempt.step, attempt.number


def above(head: Head | None, versions: Iterable[int], named: Iterable[int]) -> int:
    """A version for a `recovered` entry: above the head's, above all `versions` that have an object and all that a
    record or marker has `named`; one further, so that the hole below it says that what is missing there is known."""
    return max([head.version if head else -1, -1, *versions, *named]) + 2


def recovered(
    head: Head | None, stamp: Stamp, *, version: int, epoch: int, live: tuple[LiveStep, ...], reason: str
) -> Head:
    """The entry that a journal goes on from after it has lost entries. Attempts that the surviving head has and `live`
    has not (their step was committed again) are put aside if they are quarantined, else retired as replaced."""
    base = head or Head(format=FORMAT, version=-1, epoch=0, writer="", write_id="", time=0.0, event=Event(kind=""))
    kept = {one.id for one in live}
    replaced = [old for old in base.live if old.id not in kept]
    return replace(
        base,
        version=version,
        epoch=epoch,
        writer=stamp.writer,
        write_id=stamp.write_id,
        time=stamp.time,
        event=Event(kind="recovered", reason=reason, steps=tuple(one.step for one in live)),
        live=live,
        retired=(*base.retired, *(journal.retired_as(old, "replaced") for old in replaced if old.restorable)),
        aside=(*base.aside, *(replace(old, pins=()) for old in replaced if not old.restorable)),
    )

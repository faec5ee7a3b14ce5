"""The journal's rules for steps that somebody removes by name. As those of `journal`."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.errors import StepNotFound, UsageError
from orchestrator.rules.journal import FencedBy, Next, Rejected, Stamp, find, retired_as, successor
from orchestrator.rules.records import Head, JournalEvent


def remove(head: Head | None, stamp: Stamp, *, step: int, epoch: int | None = None) -> Next:
    """Retire one step because somebody names it, the newest, too: that rolls the run back. The only one stays, and so
    does a quarantined one: it is evidence. epoch: of the incarnation that asks; an older one than the head's is fenced,
    and rolls back nothing of its successor's."""
    if head is not None and epoch is not None and head.epoch > epoch:
        return FencedBy(head.epoch, head.writer)
    found = find(head, step) if head else None
    if head is None or found is None:
        return None
    if not found.restorable:
        text = f"step {step} is quarantined; `orchestrator gc --quarantined={step}` deletes it"
        return Rejected(UsageError(text))
    if found.pins:
        return _pinned(step, found.pins)
    live = tuple(old for old in head.live if old.step != step)
    event = JournalEvent(kind="retired", steps=(step,), reason="deleted by name")
    retired = (*head.retired, retired_as(found, "deleted"))
    return successor(head, stamp, event, live=live, retired=retired) if any(e.restorable for e in live) else _only(step)


def _pinned(step: int, pins: Iterable[str]) -> Rejected:
    return Rejected(UsageError(f"step {step} is pinned ({', '.join(pins)}); unpin it first"))


def _only(step: int) -> Rejected:
    text = f"step {step} is the only one that this run has: without it a job would begin at 0; use another root"
    return Rejected(UsageError(text))


def discard(head: Head | None, stamp: Stamp, *, step: int) -> Next:
    """Retire the quarantined attempts of one step: only somebody who names it can (`gc --quarantined=STEP`)."""
    evidence = head.quarantined if head else ()
    gone = [old for old in evidence if old.step == step]
    if head is None or not gone:
        have = ", ".join(sorted({str(old.step) for old in evidence})) or "none"
        return Rejected(StepNotFound(f"step {step} has no quarantined attempt; quarantined steps: {have}"))
    if pins := [pin for old in gone for pin in old.pins]:
        return _pinned(step, pins)
    names = {old.id for old in gone}
    live = tuple(old for old in head.live if old.id not in names)
    if not live:
        return _only(step)
    return successor(
        head,
        stamp,
        JournalEvent(kind="retired", steps=(step,), reason="quarantined, deleted by name"),
        live=live,
        retired=(*head.retired, *(retired_as(old, "quarantined") for old in gone)),
        aside=tuple(old for old in head.aside if old.id not in names),
    )

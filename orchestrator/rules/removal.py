"""The journal's rules for steps that somebody removes by name. As those of `journal`."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.errors import StepNotFound, UsageError
from orchestrator.policy import KeepPolicy
from orchestrator.rules.journal import FencedBy, Next, Rejected, Stamp, find, kept_by, newest, retired_as, successor
from orchestrator.rules.records import Head, JournalEvent


def remove(head: Head | None, stamp: Stamp, *, step: int, epoch: int | None = None) -> Next:
    """Retire one step because somebody names it, the newest, too: that rolls the run back; without the only one a job
    begins at 0. A quarantined one stays: it is evidence. epoch: of the incarnation that asks; an older one than the
    head's is fenced, and rolls back nothing of its successor's."""
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
    return successor(head, stamp, event, live=live, retired=retired)


def unwanted_newest(head: Head | None, stamp: Stamp, *, epoch: int, keep: KeepPolicy) -> Next:
    """Retire the step committed last because the user's policy does not want it: it goes by quality, not by age. Never
    a step with a pin, nor one that was proven good, nor the last one that the policy would leave: without steps a job
    begins at 0, and no policy asks for that."""
    if head is not None and head.epoch > epoch:
        return FencedBy(head.epoch, head.writer)
    found = newest(head) if head else None
    if head is None or found is None or found.pins or found.trust in ("verified", "restored"):
        return None
    kept = kept_by(keep, [entry for entry in head.live if entry.restorable], stamp.time)
    if not kept or found.step in kept:
        return None
    live = tuple(entry for entry in head.live if entry is not found)
    event = JournalEvent(kind="retired", steps=(found.step,), reason="the policy does not keep the newest step")
    return successor(head, stamp, event, live=live, retired=(*head.retired, retired_as(found, "retention")))


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

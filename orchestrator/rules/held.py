"""Which held step a job may come back on, and what a tier has room for. Pure.

A tier holds steps that the run's journal knows nothing of. It is a cache: the journal alone says what is durable, and a
held step is only ever *offered* beside it. Three things keep an offer honest:

- Order. Held and committed steps are ordered by (epoch, step): what an older incarnation holds comes after everything
  that a newer one has held or committed, whatever its number.
- Fencing. Each tier has a log of its own, of the form of a journal. An incarnation opens its epoch there, too, and from
  then on whatever an older one tries to hold is rejected by `journal.commit`.
- Wholeness. A step counts only if each of its files is on a host that is alive, and all processes agree which do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import FencedBy, Next, Stamp
from orchestrator.rules.records import Head, JournalEvent, LiveStep

Rank = tuple[int, int, int]


def rank(attempt: AttemptId) -> Rank:
    """What orders attempts, held and committed: epoch, step, number of the try."""
    return attempt.epoch, attempt.step, attempt.number


# A tier's log.


def open_epoch(head: Head | None, stamp: Stamp, *, epoch: int, version: int) -> Next:
    """Incarnation `epoch`, which the run's journal has opened in `version`, holds from now on. What older ones hold
    stays on offer; they can add nothing to it."""
    if head is not None and head.epoch >= epoch:  # the same number: the journal has been set back, and counts again
        return FencedBy(head.epoch, head.writer)
    opened = JournalEvent(kind="opened-epoch", reason=f"by version {version} of the run's journal")
    return journal.successor(head, stamp, opened, epoch=epoch)


def follow(head: Head | None, stamp: Stamp, *, epoch: int, live: Sequence[LiveStep]) -> Next:
    """What `live`, of process 0's log, says is held, another process's log says, too; what it had besides may be freed,
    if that is older than the newest of them. What is newer stays: then it is process 0 that has lost its log with its
    host. `live`: without what this process has no part of any more."""
    if head is None or head.epoch != epoch:
        return FencedBy(head.epoch, head.writer) if head and head.epoch > epoch else None
    newest = max(live, key=lambda one: rank(one.id), default=None)
    known = {one.id for one in live}
    others = [old for old in head.live if old.id not in known]
    stay = [old for old in others if newest is None or rank(old.id) > rank(newest.id)]
    gone = [old for old in others if old not in stay]
    again = {one.step for one in stay}  # a log has each step once
    following = (*(one for one in live if one.step not in again), *stay)
    if not gone and following == head.live:
        return None
    kept = {one.id for one in following}
    return journal.successor(
        head,
        stamp,
        JournalEvent(
            kind="committed" if newest else "retired",
            step=newest.step if newest else None,
            attempt=newest.attempt if newest else None,
            steps=tuple(old.step for old in gone),
        ),
        live=following,
        retired=(
            *(old for old in head.retired if old.id not in kept),
            *(journal.retired_as(old, "retention") for old in gone),
        ),
    )


def release(head: Head | None, stamp: Stamp, *, epoch: int, attempts: Collection[AttemptId], reason: str) -> Next:
    """These steps are held no more: their memory may be freed. Only the newest incarnation decides that."""
    if head is not None and head.epoch > epoch:
        return FencedBy(head.epoch, head.writer)
    gone = [live for live in head.live if live.id in attempts] if head else []
    if head is None or not gone:
        return None
    return journal.successor(
        head,
        stamp,
        JournalEvent(kind="retired", steps=tuple(live.step for live in gone), reason=reason),
        live=tuple(live for live in head.live if live not in gone),
        retired=(*head.retired, *(journal.retired_as(live, reason) for live in gone)),
    )


# Coming back.


@dataclass(frozen=True)
class Standing:
    """What the run's journal says. epoch: of its head. newest: the step that a restore would take from the store.
    barred: what somebody has quarantined by hand."""

    epoch: int
    newest: AttemptId | None = None
    barred: tuple[AttemptId, ...] = ()

    def admits(self, attempt: AttemptId) -> bool:
        """Whether a held attempt may be chosen over what the store has.

        Not one of an epoch that the journal does not know: it has lost its end, or is another run's. And not one that
        the same incarnation held at or after a step that somebody has quarantined by hand: what was wrong with that
        one is wrong with this one, too.
        """
        return self.knows(attempt) and (self.newest is None or rank(attempt) > rank(self.newest))

    def knows(self, attempt: AttemptId) -> bool:
        """As `admits`, whatever the store has."""
        return attempt.epoch <= self.epoch and not any(
            attempt.epoch == bad.epoch and rank(attempt) >= rank(bad) for bad in self.barred
        )


def standing(head: Head) -> Standing:
    newest = journal.newest(head)
    barred = tuple(old.id for old in head.quarantined if old.quarantine and old.quarantine.by_hand)
    return Standing(head.epoch, newest.id if newest else None, barred)


@dataclass(frozen=True)
class Offer:
    """A held step: its attempt, and the CRC-32C of its manifest, which makes it that one."""

    step: int
    attempt: str
    manifest_crc32c: str

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.step, self.attempt)


def offer(live: LiveStep) -> Offer:
    return Offer(live.step, live.attempt, live.manifest_crc32c)


def asked_for(journalled: Standing, whole: Collection[Offer], step: int) -> list[Offer]:
    """Of the steps whose files all are somewhere alive, `step`, as the newest incarnation has held it; also where the
    store has a newer one."""
    chosen = [one for one in whole if one.step == step and journalled.knows(one.id)]
    return sorted(chosen, key=lambda one: (one.id.epoch, one.id.number, one.manifest_crc32c), reverse=True)


def candidates(journalled: Standing, offers: Sequence[Collection[Offer]]) -> list[Offer]:
    """What to try, newest first: the held steps that every process knows to be whole and that the journal admits."""
    common = set(offers[0]).intersection(*offers[1:]) if offers else set()
    admitted = [one for one in common if journalled.admits(one.id)]
    return sorted(admitted, key=lambda one: (rank(one.id), one.manifest_crc32c), reverse=True)


def superseded(head: Head, held: Sequence[LiveStep]) -> list[AttemptId]:
    """Held steps that a restore would never take any more: the journal has a newer one."""
    newest = journal.newest(head)
    return [live.id for live in held if newest is not None and rank(live.id) <= rank(newest.id)]


# Room.


def to_free(
    found: Collection[AttemptId],
    listed: Collection[AttemptId],
    *,
    epoch: int,
    decided: Collection[AttemptId] = (),
    for_room: bool = False,
) -> list[AttemptId]:
    """Which of the attempts that a host has files of, its own processes' and copies, are in nobody's way back.

    listed: what is held, as far as this host knows: by the logs of all processes when the epoch was opened, by process
    0's and its own since a step has been held in it. decided: attempts of incarnation `epoch` that have ended on this
    process. Never freed: what is listed, and what of this incarnation has not ended here, as another host may be ahead
    by one. Of older incarnations goes what is older than the newest that is listed. What is newer was being held when
    that incarnation ended: it may be whole, and listed on a host that is away. It goes once a step of this incarnation
    is listed, or `for_room`.
    """
    newest = max(map(rank, listed), default=(-1, -1, -1))

    def is_over(one: AttemptId) -> bool:
        if one in listed or one.epoch > epoch:
            return False
        if one.epoch == epoch:
            return one in decided
        return for_room or rank(one) < newest

    return sorted((one for one in found if is_over(one)), key=rank)


def to_release(held_bytes: Sequence[int], need: int, room: int) -> int | None:
    """How many of the held steps, oldest first, must go before `need` more bytes are written where there is `room`. The
    newest stays in any case; None if even then there is too little."""
    for count in range(max(1, len(held_bytes))):
        if need <= room + sum(held_bytes[:count]):
            return count
    return None

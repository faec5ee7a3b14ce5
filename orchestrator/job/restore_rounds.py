"""What the processes of a job send one another during a restore: each round with its name and the type of its messages,
and what follows from the answers. Decides only: `restore` sends the messages and carries out the decision.

A step is tried in rounds of its own: `fits` once each has matched it with its target, `was_read` once each has read it.
Before an exchange of arrays (`load_once`) all meet in the `was_read` round, too, so that nobody begins an exchange that
another process will not join.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import msgspec

from orchestrator.errors import Damaged, OutcomeUnknown, StepRetired, StorageError, Unavailable, UnsafeKey
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.restore_check import Proof
from orchestrator.job.rounds import Round, gather

WRONG_MAX = 5  # leaves whose fingerprints a message quotes

Value = TypeVar("Value")
Other = TypeVar("Other")


# Messages.


class Chosen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The step to restore. head: the journal's newest entry as process 0 has read it, as a record, cut to what a
    restore needs."""

    step: int
    head: str


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="done"):
    """This process has matched, or read, the step."""


class Exchange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="exchange"):
    """This process has read its part of some arrays, and is about to exchange it. arrays: a fingerprint of which."""

    arrays: str


class ReadFailure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="failure"):
    """This process cannot read the step. kind: of the error. files, chunks: as of Damaged."""

    kind: str
    text: str
    files: tuple[str, ...] = ()
    chunks: tuple[str, ...] = ()


Report: TypeAlias = Done | Exchange | ReadFailure


class Sums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fingerprints of what a process has restored. by_replica: of the arrays that it holds with others, one number for
    each replica. wrong: (leaf, line) of those that it holds whole, and that are not what was saved."""

    by_replica: dict[int, str]
    wrong: tuple[tuple[str, str], ...] = ()


# Rounds.

CHOICE: Round[Chosen | None] = Round("restore: which step", Chosen | None)
QUARANTINE: Round[None] = Round("restore: quarantine", None)


def fits(step: int) -> Round[Report]:
    return Round(f"restore: step {step} fits", Report)


def was_read(step: int) -> Round[Report]:
    return Round(f"restore: step {step}", Report)


def fingerprints(step: int) -> Round[Sums]:
    return Round(f"restore: step {step} fingerprints", Sums)


def all_fingerprints(step: int) -> Round[dict[int, dict[str, str]]]:
    """Of each replica, each leaf's: only where the sums do not add up."""
    return Round(f"restore: step {step} all fingerprints", dict[int, dict[str, str]])


def stored_fingerprints(step: int) -> Round[str]:
    """Process 0: in what way what is stored is not what was saved."""
    return Round(f"restore: step {step} stored fingerprints", str)


def damage(step: int) -> Round[bool]:
    """Process 0: whether it sees the damage, too."""
    return Round(f"restore: step {step} damage", bool)


# What one process reports of a step.


@dataclass(frozen=True)
class Read(Generic[Value]):
    """This process has read the step."""

    value: Value


@dataclass(frozen=True)
class NotRead:
    """This process could not read it; the others do not know yet."""

    error: Exception


@dataclass(frozen=True)
class PeersFailed:
    """Not all processes reached the same exchange. reports: of the round in which all have met."""

    reports: Sequence[Report]


ReadOutcome: TypeAlias = Read[Value] | NotRead | PeersFailed


def result_of(read: Callable[[], Value]) -> Read[Value] | NotRead:
    """What `read` returns or raises, as a value: the other processes must know of it before it is raised here."""
    try:
        return Read(read())
    except Exception as error:
        return NotRead(error)


def report(done: Read[Value] | NotRead) -> Report:
    if isinstance(done, Read):
        return Done()
    error = done.error
    files, chunks = (error.files, error.chunks) if isinstance(error, Damaged) else ((), ())
    return ReadFailure(type(error).__name__, str(error), files, chunks)


def reports_of_all(
    rendezvous: Rendezvous, round_: Round[Report], outcome: ReadOutcome[Value], timeout_s: float
) -> Sequence[Report]:
    """What each process made of the step, by its number. A collective, unless it was told already."""
    if isinstance(outcome, PeersFailed):
        return outcome.reports
    return gather(rendezvous, round_, report(outcome), timeout_s)


def wrong_leaves(rendezvous: Rendezvous, proof: Proof, step: int, timeout_s: float) -> list[tuple[str, str]]:
    """The leaves that are not as they were saved, by what all processes have restored of `step`, each with a line about
    it. A collective."""
    sums = Sums(proof.sums(), tuple(proof.wrong_here[:WRONG_MAX]))
    answers = gather(rendezvous, fingerprints(step), sums, timeout_s)
    wrong = [leaf for answer in answers for leaf in answer.wrong]
    if not proof.holds([answer.by_replica for answer in answers]):
        details = gather(rendezvous, all_fingerprints(step), proof.details(), timeout_s)
        wrong += proof.wrong(details)
    return wrong


# What follows from the reports of all.


class Ruling(enum.Enum):
    """The same on all processes. FAULT: no other step would help, as with a target that does not fit."""

    DONE = enum.auto()
    OTHER_ARRAYS = enum.auto()
    FAULT = enum.auto()
    RETIRED = enum.auto()
    UNREADABLE = enum.auto()
    DAMAGED = enum.auto()


# Named, as they come from other processes. A newer format is a fault: this version cannot judge it.
_RULINGS = {
    **dict.fromkeys((kind.__name__ for kind in (Damaged, UnsafeKey)), Ruling.DAMAGED),
    **dict.fromkeys((kind.__name__ for kind in (StorageError, Unavailable, OutcomeUnknown)), Ruling.UNREADABLE),
    StepRetired.__name__: Ruling.RETIRED,
}


def ruling(report: Report) -> Ruling:
    """Of one report alone."""
    match report:
        case Done():
            return Ruling.DONE
        case Exchange():
            return Ruling.OTHER_ARRAYS
        case ReadFailure(kind=kind):
            return _RULINGS.get(kind, Ruling.FAULT)


def rule_on(reports: Sequence[Report]) -> tuple[Ruling, int]:
    """The ruling that all processes follow, and the first process whose report is the reason. Precedence: FAULT,
    RETIRED, UNREADABLE, DAMAGED, OTHER_ARRAYS. A step that one process could not read is not called damaged; one that
    retention has deleted is not called unreadable."""
    rulings = [ruling(report) for report in reports]
    for first in (Ruling.FAULT, Ruling.RETIRED, Ruling.UNREADABLE, Ruling.DAMAGED, Ruling.OTHER_ARRAYS):
        if first in rulings:
            return first, rulings.index(first)
    return Ruling.DONE, 0

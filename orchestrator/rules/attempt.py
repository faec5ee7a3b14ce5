"""One attempt at saving a step, from the coordinator's side, as a table-driven state machine.

    state, effects = advance(state, event)

The coordinator performs the effects and feeds back what happened as events. Duties of the caller, in order: write the
intent; report every receipt it reads, whichever way it learned of it; report the deadline; run `Finalize`, `Seal` and
`Append` when told, once each, and report how each ended. Pure: no I/O, no clock, no randomness.

    OPEN --all receipts in--> FINALIZING --FinalizeDone--> COMMITTING --Appended--> COMMITTED
      \\--a NO or deadline--> ABORTING <--FinalizeFailed--/      |
                                 \\--Appended--> ABORTED         \\--Fenced--> FENCED (from any phase)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from orchestrator.rules import holders
from orchestrator.rules.fingerprints import disagreements
from orchestrator.rules.records import Box, Failure, Intent, Receipt


class Phase(Enum):
    OPEN = "waiting for receipts"
    FINALIZING = "finalizing"
    COMMITTING = "committing"
    ABORTING = "aborting"
    COMMITTED = "committed"
    ABORTED = "aborted"
    FENCED = "fenced"


TERMINAL = frozenset({Phase.COMMITTED, Phase.ABORTED, Phase.FENCED})


@dataclass(frozen=True)
class Attempt:
    """State of one attempt. `receipts` holds one per process that has answered. own_must_agree: of leaves that every
    process has its own of, all must have the same value."""

    intent: Intent
    phase: Phase = Phase.OPEN
    receipts: Mapping[int, Receipt] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    reason: str = ""
    own_must_agree: bool = False

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(index for index in range(self.intent.process_count) if index not in self.receipts)


# Events: what happened outside.
@dataclass(frozen=True)
class ReceiptRead:
    receipt: Receipt


@dataclass(frozen=True)
class ReceiptsRead:
    """Several at once: of a job of N processes, one after the other takes N times N steps."""

    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class DeadlinePassed:
    """`hosts` names the processes as far as they are known."""

    after_s: float
    hosts: Mapping[int, str]


@dataclass(frozen=True)
class FinalizeDone:
    pass


@dataclass(frozen=True)
class FinalizeFailed:
    failure: Failure


@dataclass(frozen=True)
class Appended:
    """The journal entry asked for is durable."""


@dataclass(frozen=True)
class FencedOff:
    epoch: int
    writer: str


Event = ReceiptRead | ReceiptsRead | DeadlinePassed | FinalizeDone | FinalizeFailed | Appended | FencedOff


# Effects: what the caller must do now.
@dataclass(frozen=True)
class Finalize:
    """Merge the processes' data, write `extra.json` and the manifest, make all of it durable."""


@dataclass(frozen=True)
class AppendCommit:
    """Journal `committed`."""


@dataclass(frozen=True)
class AppendAbort:
    """Journal `aborted` with the attempt's failures and reason."""


@dataclass(frozen=True)
class Announce:
    """Tell the other processes how it ended; the journal is the truth, this only makes it quick."""


Effect = Finalize | AppendCommit | AppendAbort | Announce
Step = tuple[Attempt, tuple[Effect, ...]]


def advance(state: Attempt, event: Event) -> Step:
    """The next state and what to do. An event that does not matter any more (a late receipt) changes nothing."""
    rule = _TABLE.get((state.phase, type(event)))
    return rule(state, event) if rule else (state, ())


def _on_receipt(state: Attempt, event: ReceiptRead) -> Step:
    return _on_receipts(state, ReceiptsRead((event.receipt,)))


def _on_receipts(state: Attempt, event: ReceiptsRead) -> Step:
    receipts = dict(state.receipts)
    for receipt in event.receipts:
        if receipt.process in receipts:
            continue  # repeated: the first stands, receipts are immutable
        failure = receipt.failure or _objection(receipt, _not_ours(state, receipt))
        if failure:
            state = replace(state, receipts=receipts, failures=(*state.failures, failure))
            return _abort(state, f"process {failure.process} said no")
        receipts[receipt.process] = receipt
    if len(receipts) == len(state.receipts):
        return state, ()
    state = replace(state, receipts=receipts)
    if state.missing:
        return state, ()
    problems = uncovered(state.intent, state.receipts)
    # Replicas that differ: one of their devices computes wrongly, and nobody can say which one is right.
    problems = problems or disagreements(state.intent, state.receipts)
    if state.own_must_agree and not problems:
        problems = holders.lines(holders.differences(state.intent, state.receipts), state.receipts)
    if problems:
        return _abort(state, "; ".join(problems[:6]))
    return replace(state, phase=Phase.FINALIZING), (Finalize(),)


def _not_ours(state: Attempt, receipt: Receipt) -> str:
    """Why a receipt is not one of this attempt's, '' if it is."""
    intent = state.intent
    if receipt.id != intent.id:
        return f"receipt of {receipt.id.label} found in {intent.id.label}"
    if not 0 <= receipt.process < intent.process_count:
        return f"receipt of process {receipt.process}, expected 0 to {intent.process_count - 1}"
    if receipt.failure is None and receipt.went_by != holders.name(intent.held):
        return (
            "the devices that leaves are on have changed on process 0 since this process last asked; all ask again at "
            "the next save"
        )
    return ""


def _objection(receipt: Receipt, wrong: str) -> Failure | None:
    return Failure(process=receipt.process, host=receipt.host, phase="receipt", cause=wrong) if wrong else None


def _on_deadline(state: Attempt, event: DeadlinePassed) -> Step:
    who = ", ".join(
        f"{index} ({event.hosts[index]})" if index in event.hosts else str(index) for index in state.missing
    )
    where = state.intent.id.label
    silent = tuple(
        Failure(
            process=index, host=event.hosts.get(index, "?"), phase="receipt", cause=f"silent for {event.after_s:g} s"
        )
        for index in state.missing
    )
    reason = f"{where}: no receipt from processes [{who}] after {event.after_s:g} s"
    return _abort(replace(state, failures=(*state.failures, *silent)), reason)


def _on_finalized(state: Attempt, event: FinalizeDone) -> Step:
    return replace(state, phase=Phase.COMMITTING), (AppendCommit(),)


def _on_finalize_failed(state: Attempt, event: FinalizeFailed) -> Step:
    return _abort(replace(state, failures=(*state.failures, event.failure)), "the coordinator could not finalize")


def _on_committed(state: Attempt, event: Appended) -> Step:
    return replace(state, phase=Phase.COMMITTED), (Announce(),)


def _on_aborted(state: Attempt, event: Appended) -> Step:
    return replace(state, phase=Phase.ABORTED), (Announce(),)


def _on_fenced(state: Attempt, event: FencedOff) -> Step:
    reason = f"fenced by epoch {event.epoch} ({event.writer})"
    return replace(state, phase=Phase.FENCED, reason=reason), (Announce(),)


def _abort(state: Attempt, reason: str) -> Step:
    return replace(state, phase=Phase.ABORTING, reason=reason), (AppendAbort(),)


_CAUSES = (  # words of the reasons above, and what they are counted as
    ("fenced by epoch", "fenced"),
    ("replicas disagree", "disagree"),
    ("hosts disagree", "disagree"),
    ("said no", "refused"),
    ("no receipt from processes", "silent"),
    ("could not finalize", "finalize"),
    ("elements written", "incomplete"),
    ("written twice", "incomplete"),
    ("regions overlap", "incomplete"),
    ("outside the array", "incomplete"),
)


def cause_of(reason: str) -> str:
    """What kind of end a reason tells of, for counting: fenced, rejected, silent, finalize, incomplete, disagree or
    failed."""
    return next((cause for words, cause in _CAUSES if words in reason), "failed")


# Each rule takes the event type it stands beside.
_TABLE: dict[tuple[Phase, type], Callable[..., Step]] = {
    (Phase.OPEN, ReceiptRead): _on_receipt,
    (Phase.OPEN, ReceiptsRead): _on_receipts,
    (Phase.OPEN, DeadlinePassed): _on_deadline,
    (Phase.FINALIZING, FinalizeDone): _on_finalized,
    (Phase.FINALIZING, FinalizeFailed): _on_finalize_failed,
    (Phase.COMMITTING, Appended): _on_committed,
    (Phase.ABORTING, Appended): _on_aborted,
    **{(phase, FencedOff): _on_fenced for phase in Phase if phase not in TERMINAL},
}


def uncovered(intent: Intent, receipts: Mapping[int, Receipt]) -> list[str]:
    """Arrays whose index space the receipts do not cover exactly, one line each; [] if all is covered once."""
    problems = []
    boxes: dict[str, list[tuple[int, tuple[Box, ...]]]] = {}
    for process, receipt in receipts.items():
        for name, regions in receipt.boxes.items():
            boxes.setdefault(name, []).append((process, regions))
    looked_at: dict[Any, str] = {}  # many leaves of few layouts
    runs = iter(holders.each_of(intent.held))
    for leaf in intent.tree.leaves:
        run = next(runs, None)
        if not leaf.in_store:
            continue
        shape = leaf.stored_shape if leaf.stored_shape is not None else leaf.shape
        written = tuple(boxes.get(leaf.name, []))
        problem = looked_at.get((shape, written))
        if problem is None:
            flat = [(process, box) for process, regions in written for box in regions]
            problem = looked_at[shape, written] = _cover(shape, flat)
        if problem:
            problems.append(f"{leaf.label}{list(shape)}: {problem}{holders.why_missing(run, receipts, leaf)}")
    return problems


def _cover(shape: tuple[int, ...], boxes: Sequence[tuple[int, Box]]) -> str:
    """'' if `boxes` tile `shape` exactly, else what is wrong."""
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    volume = 0
    for process, box in boxes:
        inside = len(box.start) == len(box.stop) == len(shape) and all(
            0 <= start < stop <= size for start, stop, size in zip(box.start, box.stop, shape, strict=True)
        )
        if not inside:
            return f"process {process} wrote {list(box.start)}..{list(box.stop)}, outside the array"
        other = seen.setdefault((box.start, box.stop), process)
        if other != process or volume > math.prod(shape):
            return f"{list(box.start)}..{list(box.stop)} written twice, by processes {other} and {process}"
        volume += math.prod(stop - start for start, stop in zip(box.start, box.stop, strict=True))
    if volume != math.prod(shape):
        return f"{volume} of {math.prod(shape)} elements written"
    return "" if _disjoint([box for _, box in boxes]) else "written regions overlap"


def _disjoint(boxes: list[Box]) -> bool:
    """No two boxes share an element. Sorted sweep along the first dimension: near-linear for a sharding's grid."""
    ordered = sorted(boxes, key=lambda box: box.start)
    active: list[Box] = []
    for box in ordered:
        active = [old for old in active if not box.start or old.stop[0] > box.start[0]]
        if any(_overlap(old, box) for old in active):
            return False
        active.append(box)
    return True


def _overlap(a: Box, b: Box) -> bool:
    return all(a.start[axis] < b.stop[axis] and b.start[axis] < a.stop[axis] for axis in range(len(a.start)))

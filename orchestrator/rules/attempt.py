"""One attempt at saving a step, from the coordinator's side, as a table-driven state machine.

    state, effect = advance(state, event)

The coordinator performs the effect and reports what became of it as the next event, until there is no effect. Its
duties, in order: write the intent; report the receipts that it reads, in whatever batches; report the deadline; perform
`Finalize`, `AppendCommit` and `AppendAbort` when they are asked for, once each, and report how each ended. When the
phase is one of `DECIDED`, the attempt is over: its reason, cause and failures are what all processes hear of it.

    OPEN --all receipts in--> FINALIZING --FinalizeDone--> COMMITTING --Appended--> COMMITTED
      \\--abort vote, gap      \\--FinalizeFailed           \\--FencedOff--> FENCED
       \\  or deadline          v                             |
        `--------------------> ABORTING --FencedOff----------'
                                 \\--Appended--> ABORTED

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from orchestrator.rules import holders
from orchestrator.rules.coverage import uncovered
from orchestrator.rules.fingerprints import disagreements
from orchestrator.rules.records import Cause, Failure, Intent, Receipt

_PROBLEMS_SHOWN = 6


class Phase(Enum):
    OPEN = "waiting for receipts"
    FINALIZING = "finalizing"
    COMMITTING = "committing"
    ABORTING = "aborting"
    COMMITTED = "committed"
    ABORTED = "aborted"
    FENCED = "fenced"


DECIDED = frozenset({Phase.COMMITTED, Phase.ABORTED, Phase.FENCED})


@dataclass(frozen=True)
class Attempt:
    """State of one attempt. receipts: by process, of those that have answered. reason, cause: why it does not commit.
    own_must_agree: of leaves that every process has its own of, all must have the same value."""

    intent: Intent
    phase: Phase = Phase.OPEN
    receipts: Mapping[int, Receipt] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    reason: str = ""
    cause: Cause | None = None
    own_must_agree: bool = False

    @property
    def missing(self) -> tuple[int, ...]:
        """The processes whose receipts are not in."""
        return tuple(index for index in range(self.intent.process_count) if index not in self.receipts)


# Events: what happened outside.
@dataclass(frozen=True)
class ReceiptsRead:
    """Several at once: a job of N processes that reported one after the other would take N times N steps."""

    receipts: tuple[Receipt, ...]


@dataclass(frozen=True)
class DeadlinePassed:
    """No receipts are waited for any longer. hosts: the processes' hosts, as far as they are known."""

    after_s: float
    hosts: Mapping[int, str]


@dataclass(frozen=True)
class FinalizeDone:
    """What `Finalize` asks for is durable."""


@dataclass(frozen=True)
class FinalizeFailed:
    """What `Finalize` asks for could not be done."""

    failure: Failure


@dataclass(frozen=True)
class Appended:
    """The journal entry that was asked for is durable."""


@dataclass(frozen=True)
class FencedOff:
    """The journal entry that was asked for cannot be written: `writer` has opened the newer `epoch`."""

    epoch: int
    writer: str


Event = ReceiptsRead | DeadlinePassed | FinalizeDone | FinalizeFailed | Appended | FencedOff


# Effects: what the caller must do now.
@dataclass(frozen=True)
class Finalize:
    """Merge the processes' data and write the manifest, all of it durable."""


@dataclass(frozen=True)
class AppendCommit:
    """Journal the attempt as committed."""


@dataclass(frozen=True)
class AppendAbort:
    """Journal the attempt as aborted, with its failures, reason and cause."""


Effect = Finalize | AppendCommit | AppendAbort
Step = tuple[Attempt, Effect | None]


class UndefinedEvent(RuntimeError):
    """The caller reported what cannot have happened in this phase: a mistake in the program, never an outcome."""


def advance(state: Attempt, event: Event) -> Step:
    """The next state, and what to do now. Events that come too late (`_LATE`) change nothing. Raises UndefinedEvent for
    a pair of phase and event that is in neither table."""
    pair = state.phase, type(event)
    if rule := _TABLE.get(pair):
        return rule(state, event)
    if pair in _LATE:
        return state, None
    raise UndefinedEvent(f"{state.intent.id.label}: {type(event).__name__} while {state.phase.value}")


def _on_receipts(state: Attempt, event: ReceiptsRead) -> Step:
    receipts, held = dict(state.receipts), holders.name(state.intent.held)
    for receipt in event.receipts:
        if receipt.process in receipts:
            continue  # repeated: the first stands, receipts are immutable
        failure = receipt.failure or _unusable(state, receipt, held)
        if failure:
            state = replace(state, receipts=receipts, failures=(*state.failures, failure))
            return _abort(state, failure.kind, f"process {failure.process} voted to abort")
        receipts[receipt.process] = receipt
    if len(receipts) == len(state.receipts):
        return state, None
    state = replace(state, receipts=receipts)
    if state.missing:
        return state, None
    if problems := uncovered(state.intent, state.receipts):
        return _abort(state, Cause.INCOMPLETE, "; ".join(problems[:_PROBLEMS_SHOWN]))
    # Replicas that differ: one of their devices computes wrongly, and nobody can say which one is right.
    problems = disagreements(state.intent, state.receipts)
    if state.own_must_agree and not problems:
        problems = holders.lines(holders.differences(state.intent, state.receipts), state.receipts)
    if problems:
        return _abort(state, Cause.DISAGREE, "; ".join(problems[:_PROBLEMS_SHOWN]))
    return replace(state, phase=Phase.FINALIZING), Finalize()


def _unusable(state: Attempt, receipt: Receipt, held: str) -> Failure | None:
    """Why a receipt is not one of this attempt's, or goes by other holders than its intent; None if it is usable."""
    problem = _not_ours(state.intent, receipt, held)
    return Failure(process=receipt.process, host=receipt.host, phase="receipt", cause=problem) if problem else None


def _not_ours(intent: Intent, receipt: Receipt, held: str) -> str:
    if (receipt.step, receipt.attempt) != (intent.step, intent.attempt):
        return f"receipt of {receipt.id.label} found in {intent.id.label}"
    if not 0 <= receipt.process < intent.process_count:
        return f"receipt of process {receipt.process}, expected 0 to {intent.process_count - 1}"
    if receipt.went_by != held:
        return (
            "the devices that leaves are on have changed on process 0 since this process last asked; all ask again at "
            "the next save"
        )
    return ""


def _on_deadline(state: Attempt, event: DeadlinePassed) -> Step:
    who = ", ".join(
        f"{index} ({event.hosts[index]})" if index in event.hosts else str(index) for index in state.missing
    )
    where = state.intent.id.label
    silence = f"silent for {event.after_s:g} s"
    silent = tuple(
        Failure(process=index, host=event.hosts.get(index, "?"), phase="receipt", cause=silence, kind=Cause.SILENT)
        for index in state.missing
    )
    reason = f"{where}: no receipt from processes [{who}] after {event.after_s:g} s"
    return _abort(replace(state, failures=(*state.failures, *silent)), Cause.SILENT, reason)


def _on_finalized(state: Attempt, event: FinalizeDone) -> Step:
    return replace(state, phase=Phase.COMMITTING), AppendCommit()


def _on_finalize_failed(state: Attempt, event: FinalizeFailed) -> Step:
    state = replace(state, failures=(*state.failures, event.failure))
    return _abort(state, Cause.FINALIZE, "the coordinator could not finalize")


def _on_committed(state: Attempt, event: Appended) -> Step:
    return replace(state, phase=Phase.COMMITTED), None


def _on_aborted(state: Attempt, event: Appended) -> Step:
    return replace(state, phase=Phase.ABORTED), None


def _on_fenced(state: Attempt, event: FencedOff) -> Step:
    reason = f"fenced by epoch {event.epoch} ({event.writer})"
    return replace(state, phase=Phase.FENCED, reason=reason, cause=Cause.FENCED), None


def _abort(state: Attempt, cause: Cause, reason: str) -> Step:
    return replace(state, phase=Phase.ABORTING, cause=cause, reason=reason), AppendAbort()


# Each rule takes the event type it stands beside.
_TABLE: dict[tuple[Phase, type], Callable[..., Step]] = {
    (Phase.OPEN, ReceiptsRead): _on_receipts,
    (Phase.OPEN, DeadlinePassed): _on_deadline,
    (Phase.FINALIZING, FinalizeDone): _on_finalized,
    (Phase.FINALIZING, FinalizeFailed): _on_finalize_failed,
    (Phase.COMMITTING, Appended): _on_committed,
    (Phase.COMMITTING, FencedOff): _on_fenced,
    (Phase.ABORTING, Appended): _on_aborted,
    (Phase.ABORTING, FencedOff): _on_fenced,
}
# Receipts are read, and the deadline is watched, beside what the machine asks for: both may be reported once the
# attempt waits for neither. They change nothing then; whatever else is not in the table is a mistake.
_LATE = frozenset(
    (phase, late) for phase in Phase if phase is not Phase.OPEN for late in (ReceiptsRead, DeadlinePassed)
)

"""What happened, as typed values, logged in one place. Log events, not sentences.

`emit` may be called from any thread. The line goes to absl logging; `subscribe` adds further readers: the event log
(`event_log`), metrics, traces, tests. The schema is in docs/reference/events.md, which a test compares with this file.
Names, fields and units are a contract: fields may be added, never renamed or given another meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import get_args

from absl import logging

from orchestrator.texts import printable

PHASES = ("staging", "writing", "sealing", "waiting", "committing")  # of a save on one process, in this order
READING, AGREEING = "reading", "agreeing"  # phases of a restore on one process; the second: its own arrays are there


@dataclass(frozen=True)
class EpochOpened:
    """An incarnation of the job has begun on this process."""

    epoch: int
    root: str
    process_count: int


@dataclass(frozen=True)
class Alive:
    """The main thread's own sign of life, now and then, and when it goes on after standing still. `step`: -1 if it is
    at none. `idle_s`: how long it had reported nothing before."""

    doing: str
    step: int
    idle_s: float = 0.0


@dataclass(frozen=True)
class Position:
    """Where a main thread is. `doing`: training, restoring, ...; `step`: None if it is at none. `barrier`: the one it
    waits in, or ''. `since_s`: for how long it has been doing this; `idle_s`: since it last reported anything.
    `steps`: different steps of training since the agent was opened; below 2 the first one may still be compiling.
    `step_s`: median time of the last steps; 0 if not known. `startup_s`: from the start of the process until training
    went on, 0 before that."""

    doing: str
    step: int | None
    since_s: float
    idle_s: float
    barrier: str = ""
    steps: int = 0
    step_s: float = 0.0
    startup_s: float = 0.0


@dataclass(frozen=True)
class Pulse(Position):
    """This process lives: every few seconds, from a thread of its own. Where the main thread is meanwhile; `step`: -1
    if it is at none. `late_s`: how much too late the thread woke, at most. `process_id`: by which `own_process` finds
    the process on its machine; '' where that is not known."""

    step: int
    late_s: float = 0.0
    process_id: str = ""


@dataclass(frozen=True)
class SavePhase:
    """A save enters `phase` on this process, or is still in it. `elapsed_s`: since the save began here.
    `written_bytes`: of this process's arrays, so far. `committing` is process 0's alone: all receipts are in."""

    step: int
    attempt: str
    phase: str
    elapsed_s: float
    written_bytes: int


@dataclass(frozen=True)
class SaveStarted:
    """`save` returns to the training loop after `blocked_s`."""

    step: int
    attempt: str
    blocked_s: float


@dataclass(frozen=True)
class SaveCommitted:
    """`elapsed_s`: from the call of `save` to the commit, as this process saw it. `state_bytes`: of all files of the
    step, on process 0; 0 elsewhere. `quarantined`: attempts of the run that are, on process 0; -1 elsewhere."""

    step: int
    attempt: str
    elapsed_s: float
    state_bytes: int
    quarantined: int = -1


@dataclass(frozen=True)
class SaveNotCommitted:
    """cause: one of `rules.records.Cause`, the same on all processes."""

    step: int
    attempt: str
    reason: str
    cause: str = "failed"


@dataclass(frozen=True)
class StepHeld:
    """This process knows that the step is held in memory (`tiers`), and that its copies are in. `elapsed_s`: from the
    call of `save`. `held_bytes`: of all files of the step, on process 0; 0 elsewhere. `copies`: on how many other hosts
    this process's part is. `sent_bytes`: what it has sent there, all copies together."""

    step: int
    attempt: str
    elapsed_s: float
    held_bytes: int
    copies: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class StepNotHeld:
    """The step is not held in memory. Training and the saves to the store go on."""

    step: int
    attempt: str
    reason: str


@dataclass(frozen=True)
class HeldStepDropped:
    """A held step was newer than what the store has, and a restore could not take it. `reason`: what of it is missing
    or damaged, and on which process."""

    step: int
    attempt: str
    reason: str


@dataclass(frozen=True)
class CopyDropped:
    """What `source` has given of a held step is gone, unreadable or not what was written; the next source is asked, and
    so nothing is lost yet. `file`: of the attempt; `reason`: names the chunk, too."""

    step: int
    attempt: str
    source: str
    file: str
    reason: str


@dataclass(frozen=True)
class HostLocalDiffers:
    """Processes have values of their own in `leaves` leaves, which differ; process 0's are stored. `reason` names the
    first few, and hosts. Once for each leaf; on process 0."""

    step: int
    attempt: str
    leaves: int
    reason: str


@dataclass(frozen=True)
class RestorePhase:
    """A long restore enters `phase` on this process, or is still in it. `elapsed_s`: since it began to read arrays.
    `read_bytes`: of this process's arrays, so far; `total_bytes`: of how many at most, 0 if that is not known."""

    step: int
    attempt: str
    phase: str
    elapsed_s: float
    read_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class StepRestored:
    """`elapsed_s`: whole restore, with agreeing. `array_s`, `read_bytes`: this process's reading of arrays. `source`:
    "store", "memory", "peers", or several of them, as "peers and memory": most came from the first."""

    step: int
    attempt: str
    elapsed_s: float
    read_bytes: int
    array_s: float = 0.0
    source: str = "store"


@dataclass(frozen=True)
class SteppedDown:
    step: int
    attempt: str
    reason: str


@dataclass(frozen=True)
class Retried:
    """Something that may fail is done again, in `wait_s`; `tries` so far. `what`: journal (another writer was first) or
    store (a request got no usable answer; `operation`, `name` and `reason` say which and why)."""

    what: str
    tries: int
    operation: str = ""
    name: str = ""
    reason: str = ""
    wait_s: float = 0.0


@dataclass(frozen=True)
class CredentialsRejected:
    """A store, or whoever gives tokens for it, does not accept who this process is (`name`), for a reason that does not
    pass by itself. Once for each request that fails because of it."""

    name: str
    reason: str


@dataclass(frozen=True)
class CadenceChosen:
    """`oc.auto` saves every `interval_s` from now on. `goodput`: expected share of useful time."""

    interval_s: float
    goodput: float
    because: str


@dataclass(frozen=True)
class AttemptsDeleted:
    attempts: int
    deleted_bytes: int
    failed: int


@dataclass(frozen=True)
class Closed:
    """This process's agent was closed in order. `failures`: saves of this incarnation that did not commit.
    `last_step`: the newest one that it was asked to save, or whether to; -1 if none."""

    failures: int
    last_step: int = -1


Event = (
    EpochOpened
    | Alive
    | Pulse
    | SavePhase
    | SaveStarted
    | SaveCommitted
    | SaveNotCommitted
    | StepHeld
    | StepNotHeld
    | HeldStepDropped
    | CopyDropped
    | HostLocalDiffers
    | RestorePhase
    | StepRestored
    | SteppedDown
    | Retried
    | CredentialsRejected
    | AttemptsDeleted
    | CadenceChosen
    | Closed
)
# What logs call them, where the class has a name of its own here: names in logs are a contract.
_LOGGED_AS: dict[type[Event], str] = {
    SaveCommitted: "Committed",
    StepRestored: "Restored",
    AttemptsDeleted: "Collected",
}
KINDS: dict[str, type[Event]] = {_LOGGED_AS.get(kind, kind.__name__): kind for kind in get_args(Event)}
_NAMES = {kind: name for name, kind in KINDS.items()}
_WARNINGS = (
    SaveNotCommitted,
    StepNotHeld,
    HeldStepDropped,
    CopyDropped,
    SteppedDown,
    HostLocalDiffers,
    CredentialsRejected,
)
_DETAILS = (Alive, Pulse, SavePhase, RestorePhase)  # for programs; people would drown in them
_readers: list[Callable[[Event], None]] = []
_unlogged = 0  # how many who say by themselves what happens


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Meanwhile events are not logged: for a command, whose answer or error says what became of it."""
    global _unlogged
    _unlogged += 1
    try:
        yield
    finally:
        _unlogged -= 1


def emit(event: Event) -> None:
    """Log `event` as `name key=value ...` and hand it to every subscriber."""
    if not _unlogged:
        _log(event)
    for reader in tuple(_readers):
        reader(event)


def _log(event: Event) -> None:
    text = " ".join(f"{field.name}={_text(getattr(event, field.name))}" for field in fields(event))
    level = logging.WARNING if isinstance(event, _WARNINGS) else logging.INFO
    logging.log(logging.DEBUG if isinstance(event, _DETAILS) else level, "%s %s", name_of(event), text)


def name_of(event: Event) -> str:
    """What an event is called in logs."""
    return _NAMES[type(event)]


def subscribe(reader: Callable[[Event], None]) -> Callable[[], None]:
    """Call `reader` with every later event, on the emitting thread. Returns what ends the subscription."""
    _readers.append(reader)
    return lambda: _readers.remove(reader)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return printable(repr(value) if isinstance(value, str) and " " in value else str(value))

"""The rules of a supervisor: what to do when processes exit or an operator's signal comes. Pure: no I/O, no clock.

A launcher (local, Slurm, ...) holds a `State`, feeds it what it sees and carries out the effects it gets back:

    running --a process fails--> ending (the others are told to end) --all exited--> Restart or Finish
    running --operator's signal--> stopping (the signal goes to all) --all exited--> Finish
    running --all exited with 0--> Finish(0)
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

# A second start cannot mend these: wrong usage stays wrong, and a fenced job would fence its own successor in turn.
FINAL_CODES = frozenset({2, 5})


@dataclass(frozen=True)
class Exit:
    """Process `index` has ended. `returncode` is `subprocess`'s: a negative number is the signal that ended it."""

    index: int
    returncode: int

    @property
    def failed(self) -> bool:
        return self.returncode != 0

    @property
    def code(self) -> int:
        """What a shell would show: 128 + signal for a signal."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    def describe(self) -> str:
        if self.returncode >= 0:
            return f"exited with code {self.returncode}"
        return f"was ended by {signal_name(-self.returncode)}"


@dataclass(frozen=True)
class Rules:
    """What the user chose. `end_grace_s` is between SIGTERM and SIGKILL for the others of a failed process;
    `stop_grace_s` between an operator's signal and SIGKILL, long enough for a last save."""

    max_restarts: int = 0
    end_grace_s: float = 5.0
    stop_grace_s: float = 60.0
    final_codes: frozenset[int] = FINAL_CODES


@dataclass(frozen=True)
class State:
    """One incarnation of the job as its supervisor sees it."""

    rules: Rules
    running: frozenset[int]
    restart_count: int = 0
    cause: Exit | None = None
    stop_signal: int | None = None


@dataclass(frozen=True)
class Signal:
    """Send `signum` to these processes; SIGKILL those that are still there after `grace_s`."""

    processes: frozenset[int]
    signum: int
    grace_s: float


@dataclass(frozen=True)
class Restart:
    """All have ended: start the job again with this restart count."""

    restart_count: int


@dataclass(frozen=True)
class Finish:
    """All have ended: the launcher leaves with this code."""

    code: int


Effect = Signal | Restart | Finish


def signal_name(signum: int) -> str:
    """`SIGKILL` for 9; `signal 99` for a number without a name."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def first_cause(exits: Sequence[Exit]) -> Exit | None:
    """The failure among exits seen at the same moment that most likely caused the others; None if all are 0."""

    def rank(exit_: Exit) -> tuple[int, int]:
        # JAX's survivors of a lost peer abort or raise; a process ended by another signal was the peer.
        ended_from_outside = exit_.returncode < 0 and exit_.returncode != -signal.SIGABRT
        return (0 if ended_from_outside else 1, exit_.index)

    return min((exit_ for exit_ in exits if exit_.failed), key=rank, default=None)


def on_exits(state: State, exits: Sequence[Exit]) -> tuple[State, tuple[Effect, ...]]:
    """Processes have ended, all seen at the same moment. Returns the new state and what to do now."""
    if not exits:
        return state, ()
    failed_before = state.cause is not None
    state = replace(
        state,
        running=state.running - {exit_.index for exit_ in exits},
        cause=state.cause or first_cause(exits),
    )
    if not state.running:
        return state, (_after_the_last(state),)
    if state.cause is None or failed_before or state.stop_signal is not None:
        return state, ()
    return state, (Signal(state.running, signal.SIGTERM, state.rules.end_grace_s),)


def on_signal(state: State, signum: int) -> tuple[State, tuple[Effect, ...]]:
    """The operator sent `signum` to the launcher: pass it on, and at the second one kill."""
    if state.stop_signal is not None:
        return state, (Signal(state.running, signal.SIGKILL, 0.0),)
    return replace(state, stop_signal=signum), (Signal(state.running, signum, state.rules.stop_grace_s),)


def _after_the_last(state: State) -> Effect:
    if state.cause is None:
        return Finish(0)
    stopped = state.stop_signal is not None
    if stopped or state.cause.code in state.rules.final_codes or state.restart_count >= state.rules.max_restarts:
        return Finish(state.cause.code)
    return Restart(state.restart_count + 1)

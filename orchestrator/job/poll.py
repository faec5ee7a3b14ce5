"""The one way in which the processes of a job wait for each other: ask, pause, ask again, and stop at a deadline.

Signals are a fast path and may be lost; storage is authoritative. `signal` is asked often and costs little, `storage`
once a second. Any thread; nothing here is a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from orchestrator.errors import WaitTimeout

Value = TypeVar("Value")
STORAGE_S = 1.0  # between two questions to storage


@dataclass(frozen=True)
class Clock:
    """Seconds that only grow, and a way to let them pass. A test gives one that does not wait."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Pause:
    """Between two questions: first_s, and `growth` of the time waited so far on top, but at most longest_s."""

    first_s: float
    longest_s: float
    growth: float = 0.0

    def after(self, waited_s: float) -> float:
        return min(self.longest_s, self.first_s + self.growth * waited_s)


SIGNALS = Pause(0.002, 0.01, growth=0.1)  # a save of small leaves takes a few of the first
REAL = Clock()
ANSWERS_PER_S = 20_000  # that the coordination service in process 0 is asked for at most


def among(askers: int) -> Pause:
    """As SIGNALS, for as many processes that all ask: of 10,000 each asks every half second at most."""
    return Pause(SIGNALS.first_s, max(SIGNALS.longest_s, askers / ANSWERS_PER_S), SIGNALS.growth)


def poll(
    signal: Callable[[], Value | None],
    timeout_s: float,
    late: Callable[[], Value],
    *,
    pause: Pause = SIGNALS,
    storage: Callable[[], Value | None] = lambda: None,
    clock: Clock = REAL,
) -> Value:
    """The first answer of `signal` or `storage` that is not None; after `timeout_s`, what `late` returns or raises.

    `signal` is asked at once, even with no time left, and once more at the deadline; `storage` every STORAGE_S. Raises
    what any of them raises.
    """
    started = clock.now()
    ask_at = started + STORAGE_S
    while True:
        answer = signal()
        if answer is None and clock.now() >= ask_at:
            answer = storage()
            ask_at = clock.now() + STORAGE_S
        if answer is not None:
            return answer
        waited_s = clock.now() - started
        if waited_s >= timeout_s:
            return late()
        clock.sleep(min(pause.after(waited_s), timeout_s - waited_s))


def timed_out(text: str) -> Callable[[], NoReturn]:
    """For `poll`'s `late`: raises WaitTimeout(text). `text` says for whom was waited, for what and how long."""

    def late() -> NoReturn:
        raise WaitTimeout(text)

    return late

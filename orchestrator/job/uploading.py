"""Who is bringing its part of a save to the store from memory, so that those who have saved theirs directly go on
waiting: an upload may take longer than a save, and ends as the journal says.

Whoever uploads for longer than most saves take says so again and again. What it says is believed for as long as it
changes: a process that is gone, or stopped, says nothing. Any thread.
"""

from __future__ import annotations

import time

from orchestrator.job.poll import REAL, Clock
from orchestrator.job.signals import Signals
from orchestrator.rules.attempt_id import AttemptId

AGAIN_S = 2.0  # between two questions whether somebody still uploads
_SAY_S, _BELIEVED_S = 5.0, 30.0
_SAID_PER_S = 500  # at most, by all processes together


class Upholding:
    """This process's own part. from_s: of monotonic time; before, nobody asks."""

    def __init__(self, signals: Signals, attempt: AttemptId, count: int, from_s: float) -> None:
        self._signals, self._attempt = signals, attempt
        self._every_s, self._next_s, self._said = max(_SAY_S, count / _SAID_PER_S), from_s, 0

    def say(self) -> None:
        """It goes on. Costs nothing when it is asked for often."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self._every_s
            self._said += 1
            self._signals.post_uploading(self._attempt, self._said)


class Uploads:
    """Of one attempt, as another process sees them."""

    def __init__(self, signals: Signals, attempt: AttemptId, count: int, clock: Clock = REAL) -> None:
        self._signals, self._attempt, self._clock = signals, attempt, clock
        self._believed_s = max(_BELIEVED_S, 6 * count / _SAID_PER_S)
        self._heard: dict[int, tuple[int, float]] = {}

    def going_on(self) -> list[int]:
        """The processes that upload their parts."""
        now = self._clock.now()
        for process, said in self._signals.uploading(self._attempt).items():
            if self._heard.get(process, (0, 0.0))[0] != said:
                self._heard[process] = (said, now)
        return sorted(process for process, (_, since) in self._heard.items() if now - since < self._believed_s)

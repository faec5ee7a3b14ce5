"""That a held step is in the logs of other hosts, too: process 0 calls it held only then. It may be lost with its host
right afterwards, and a step that no log is left to list would be lost with it.

Any thread; signals only. What is lost of them costs the step its event, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection

from orchestrator.job.poll import REAL, Clock, poll
from orchestrator.job.signals import SignalBoard
from orchestrator.rules.attempt_id import AttemptId

ENTERED_S = 10.0  # an append to a log in memory, behind a read of process 0's


class Entered:
    """board: of the job. incarnation_id: whose steps these are."""

    def __init__(self, board: SignalBoard, incarnation_id: str, clock: Clock = REAL) -> None:
        self._board, self._clock = board, clock
        self._all = f"orchestrator/{incarnation_id}/entered/"
        self._last = ""

    def say(self, attempt: AttemptId) -> None:
        """This process has entered it into its log."""
        self._board.post(f"{self._of(attempt)}{self._board.process}", "yes")

    def missing(self, attempt: AttemptId, processes: Collection[int], timeout_s: float = ENTERED_S) -> list[int]:
        """Process 0: which of these have not entered it in time."""
        of = self._of(attempt)
        if self._last not in ("", of):
            self._board.forget(self._last)
        self._last = of

        def left() -> list[int]:
            entered = self._board.poll(of).keys() if processes else ()
            return [process for process in sorted(processes) if str(process) not in entered]

        def done() -> list[int] | None:
            return None if left() else []

        return poll(done, timeout_s, left, clock=self._clock)

    def _of(self, attempt: AttemptId) -> str:
        return f"{self._all}{attempt.step}-{attempt.name}/"

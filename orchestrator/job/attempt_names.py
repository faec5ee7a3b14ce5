"""What this process calls its attempts. Computed, not communicated: every process comes to the same names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.rules.attempt_id import AttemptId


class AttemptNames:
    """Of one incarnation, in the store and in memory: a name is used once, wherever it is. Main thread."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # step -> attempts so far; the same on all processes
        self._in_call: dict[int, AttemptId] | None = None

    def next(self, step: int, epoch: int) -> AttemptId:
        """For an attempt at `step` that begins."""
        if self._in_call is not None and step in self._in_call:
            return self._in_call[step]
        number = self._numbers[step] = self._numbers.get(step, 0) + 1
        attempt = AttemptId.of(step, epoch, number)
        if self._in_call is not None:
            self._in_call[step] = attempt
        return attempt

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Within it, what begins at a step is one attempt, whether it is saved, held or both."""
        self._in_call = {}
        try:
            yield
        finally:
            self._in_call = None

"""Parts of a state on their way from the devices to the threads that write them, within a memory budget."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from orchestrator.arrays.writing.staging import Part
from orchestrator.errors import WaitTimeout

_LOOK_S = 0.5


class PartQueue:
    """`limit_bytes`: of what is staged and not yet written (None: no limit). One thread adds, several take."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self._limit = limit_bytes
        self._parts: deque[Part] = deque()
        self._changed = threading.Condition()
        self._open = limit_bytes is not None
        self._error: BaseException | None = None
        self.held_bytes = 0
        self.peak_bytes = 0  # the most that was held

    def wait_for_room(self, size: int, deadline: float) -> None:
        """Until `size` bytes fit, or nothing is held any more (then the largest leaf goes alone). Raises WaitTimeout at
        `deadline` (monotonic), and what a writing thread failed with."""
        assert self._limit is not None
        with self._changed:
            while self.held_bytes and self.held_bytes + size > self._limit:
                if self._error is not None:
                    raise self._error
                if time.monotonic() > deadline:
                    raise WaitTimeout(
                        f"{self.held_bytes} bytes of the state are not written yet, host_bytes_max is {self._limit}; "
                        "the store is too slow"
                    )
                self._changed.wait(_LOOK_S)

    def add(self, parts: Sequence[Part]) -> None:
        """The parts of a leaf; from now on they are held here alone."""
        if self._limit is None:
            self._parts.extend(parts)
            return
        with self._changed:
            self._parts.extend(parts)
            self.held_bytes += sum(data.nbytes for data, _ in parts)
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            self._changed.notify_all()

    @property
    def waiting_bytes(self) -> int:
        """Of what nobody has taken yet."""
        return sum(data.nbytes for data, _ in self._parts)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more is coming. With `error`: a writing thread has failed."""
        with self._changed:
            self._open, self._error = False, self._error or error
            self._changed.notify_all()

    def take(self) -> Part | None:
        """The next part; None if there is none and none will come."""
        while True:
            open_before = self._open  # looked at first: a part may be added, and the end told, between two looks
            try:
                return self._parts.popleft()
            except IndexError:
                if not open_before:
                    return None
            with self._changed:
                if self._open and not self._parts:
                    self._changed.wait(_LOOK_S)

    def written(self, size: int) -> None:
        if self._limit is None:
            return
        with self._changed:
            self.held_bytes -= size
            self._changed.notify_all()

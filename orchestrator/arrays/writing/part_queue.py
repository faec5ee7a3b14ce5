"""Parts of a state on their way from the devices to the threads that write them, within a memory budget."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from orchestrator.arrays.writing.staging import StagedPart
from orchestrator.errors import StorageError, WaitTimeout

_WAKE_S = 0.5  # a waiting thread polls this often, even if nothing wakes it


class PartQueue:
    """One thread adds, several take; everything is read and changed under one lock.

    limit_bytes: how much may be staged and not yet written. None: no limit, and all parts are added before any is
    taken, unless it was said to `expect_more`.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = self._limit = limit_bytes
        self._changed = threading.Condition()  # its lock guards all that follows
        self._parts: deque[StagedPart] = deque()
        self._open = limit_bytes is not None
        self._error: BaseException | None = None
        self._held_bytes = self._peak_bytes = 0

    def expect_more(self) -> None:
        """Parts are taken while others are still added."""
        with self._changed:
            self._open = True

    def wait_for_room(self, size: int, deadline: float) -> None:
        """Wait until `size` bytes fit, or nothing is held (so that a leaf above the limit goes alone). Raises
        WaitTimeout at `deadline` (monotonic), what a writing thread failed with, and StorageError once the write has
        been given up: nobody makes room any more."""
        if self._limit is None:
            return
        with self._changed:
            while self._held_bytes and self._held_bytes + size > self._limit:
                if self._error is not None:
                    raise self._error
                if not self._open:
                    raise StorageError("the write was given up while parts of the state waited for room")
                if time.monotonic() > deadline:
                    raise WaitTimeout(
                        f"{self._held_bytes} bytes of the state are not written yet, host_bytes_max is {self._limit}; "
                        "the store is too slow"
                    )
                self._changed.wait(_WAKE_S)

    def add(self, parts: Sequence[StagedPart]) -> None:
        """Add the parts of a leaf; the caller keeps no reference to them."""
        with self._changed:
            self._parts.extend(parts)
            if self._limit is not None:
                self._held_bytes += sum(data.nbytes for data, _ in parts)
                self._peak_bytes = max(self._peak_bytes, self._held_bytes)
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """No more parts will be added. error: why a writing thread has failed."""
        with self._changed:
            self._open, self._error = False, self._error or error
            self._changed.notify_all()

    def take(self) -> StagedPart | None:
        """The next part; None if there is none and none will come."""
        with self._changed:
            while self._open and not self._parts:
                self._changed.wait(_WAKE_S)
            return self._parts.popleft() if self._parts else None

    def written(self, size: int) -> None:
        """A part of `size` bytes is written, and its memory free again."""
        if self._limit is not None:
            with self._changed:
                self._held_bytes -= size
                self._changed.notify_all()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that no thread has taken yet."""
        with self._changed:
            return sum(data.nbytes for data, _ in self._parts)

    @property
    def held_bytes(self) -> int:
        """Bytes that are not written yet; 0 without a limit."""
        with self._changed:
            return self._held_bytes

    @property
    def peak_bytes(self) -> int:
        """The largest `held_bytes` so far; 0 without a limit."""
        with self._changed:
            return self._peak_bytes

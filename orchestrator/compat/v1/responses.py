"""What a v1 save in the background gives back: something to wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from absl import logging

T = TypeVar("T")


class SaveResponse(Generic[T]):
    """Of one save. `settle` waits for it, and gives what `result` returns; `saved` is that of a committed one, which
    callbacks get; `running` says whether it goes on. Any thread; callbacks run on the save's."""

    def __init__(self, settle: Callable[[], T], saved: T, running: Callable[[], bool]) -> None:
        self._settle, self._saved, self._running = settle, saved, running
        self._lock = threading.Lock()
        self._committed = False
        self._callbacks: list[Callable[[T], None]] = []
        self._result: list[T] = []

    def result(self, timeout: float | None = None) -> T:
        """Wait until the save has ended. Raises TimeoutError after `timeout` seconds, when it goes on by itself."""
        late_s = None if timeout is None else time.monotonic() + timeout
        while late_s is not None and not self._result and self._running():
            if time.monotonic() >= late_s:
                raise TimeoutError(f"the save goes on after {timeout:g} s; ask again")
            time.sleep(0.01)
        if not self._result:
            self._result = [self._settle()]
        return self._result[0]

    def on_complete(self, callback: Callable[[T], None]) -> None:
        """Have `callback` called with what `result` returns once the save is committed; at once if it is."""
        with self._lock:
            if not self._committed:
                self._callbacks.append(callback)
                return
        callback(self._saved)

    def committed(self) -> None:
        """On the save's thread."""
        with self._lock:
            self._committed = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self._saved)
            except Exception:  # the user's; the save is committed all the same
                logging.exception("on_complete: %r raised", callback)

    def ended(self, result: T) -> None:
        """Its outcome is known before anybody has asked."""
        if not self._result:
            self._result = [result]

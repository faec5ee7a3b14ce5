"""How fast bytes may go somewhere: a token bucket that all threads of a process share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_SLEEP_S = 0.2  # at most, between two questions whether to go on


class Throttle:
    """bytes_per_s: for all who take from it together; None: no bound. Any thread."""

    def __init__(
        self,
        bytes_per_s: int | None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s, self._now, self._sleep = bytes_per_s, now, sleep
        self._lock = threading.Lock()
        self._paid_until_s = 0.0  # until when what was taken so far takes, at this speed

    def lift(self) -> None:
        """From now on there is no bound."""
        self._bytes_per_s = None

    def take(self, count: int, check: Callable[[], None] = lambda: None) -> None:
        """Return when `count` more bytes may go. `check`: called while this waits; what it raises is raised."""
        check()
        if not self._bytes_per_s:
            return
        with self._lock:
            begins_s = max(self._paid_until_s, self._now())
            self._paid_until_s = begins_s + count / self._bytes_per_s
        while self._bytes_per_s and (left_s := begins_s - self._now()) > 0:
            self._sleep(min(left_s, _SLEEP_S))
            check()

"""How far a long work has come, how fast it goes and what is left of it: words, and a line that is drawn in its place.

One thing for the commands and for a job's restores. A terminal and a notebook's cell both go back to the beginning of
the line at a carriage return; nothing more is asked of them, and no thread is started: what reports draws.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from orchestrator.texts import duration, printable, size

Unit = Literal["items", "bytes"]

_DRAWN_S = 0.2  # between two drawings, at least
_PACE_S = 10.0  # the last so many seconds say how fast it goes
_SAMPLE_S = 0.5
_CELLS = 24
_COLUMNS = 100  # of a cell


class Pace:
    """How much is done, and how fast. `total`: None while nobody knows. `clock`: in seconds. `since_s`: for how long
    the work has been going on."""

    def __init__(
        self, unit: Unit, total: int | None, clock: Callable[[], float] = time.monotonic, since_s: float = 0.0
    ) -> None:
        self.done, self.total = 0, total
        self._unit, self._clock = unit, clock
        self._samples = deque([(clock() - since_s, 0)])

    def reach(self, done: int, total: int | None) -> None:
        """So much is done by now. What is done again counts again: never more than there is."""
        self.done, self.total = done if total is None else min(done, total), total
        now = self._clock()
        if now - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now, self.done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _PACE_S:
            self._samples.popleft()

    @property
    def per_s(self) -> float:
        """Lately; 0 until it can be told."""
        since, done = self._samples[0]
        passed_s = self._clock() - since
        return (self.done - done) / passed_s if passed_s >= _SAMPLE_S else 0.0

    @property
    def share(self) -> float | None:
        return None if self.total is None else self.done / max(1, self.total)

    def __str__(self) -> str:
        """`1.2 GiB of 2.7 GiB, 512.0 MiB/s, 3 s left`"""
        whole = "" if self.total is None else f" of {self._count(self.total)}"
        parts, per_s = [self._count(self.done) + whole], self.per_s
        if per_s > 0:
            parts.append(f"{self._count(per_s)}/s")
            if self.total is not None:
                left_s = max(1, round((self.total - self.done) / per_s))
                parts.append(f"{f'{left_s} s' if left_s < 60 else duration(left_s)} left")
        return ", ".join(parts)

    def _count(self, count: float) -> str:
        return size(count) if self._unit == "bytes" else f"{count:.0f}"


class Bar:
    """Drawn on standard error. Any thread. `shown`: False draws nothing. `since_s`: as Pace."""

    def __init__(
        self, about: str, total: int | None, unit: Unit = "bytes", *, shown: bool = True, since_s: float = 0.0
    ) -> None:
        self._about, self._shown = printable(about), shown
        self._pace = Pace(unit, total, since_s=since_s)
        self._lock = threading.Lock()
        self._drawn_s, self._width = float("-inf"), 0

    def add(self, count: int) -> None:
        """So much more is done."""
        with self._lock:
            self._reach(self._pace.done + count, self._pace.total)

    def reach(self, done: int, total: int | None) -> None:
        """So much is done by now, and so much there is."""
        with self._lock:
            self._reach(done, total)

    def file(self, key: str) -> None:
        self.add(1)

    def close(self) -> None:
        """Leave no trace of it. Idempotent."""
        with self._lock:
            if self._width:
                self._write("\r" + " " * self._width + "\r")
            self._shown, self._width = False, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reach(self, done: int, total: int | None) -> None:
        self._pace.reach(done, total)
        now = time.monotonic()
        if self._shown and now - self._drawn_s >= _DRAWN_S:
            self._drawn_s = now
            text = drawn(self._about, self._pace)[: _columns() - 1]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            sys.stderr.write(text)
            sys.stderr.flush()


def drawn(about: str, pace: Pace) -> str:
    """`restoring step 90  [###########-------------]  45 %  1.2 GiB of 2.7 GiB, 512.0 MiB/s, 3 s left`"""
    share = pace.share
    if share is None:
        return f"{about}  {pace}"
    full = round(share * _CELLS)
    return f"{about}  [{'#' * full}{'-' * (_CELLS - full)}]  {share:.0%}  {pace}"


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no terminal
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    return _COLUMNS

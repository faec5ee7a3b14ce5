"""What a person who sits at a terminal is told of a run: a line for each save that counts, and for what was restored; a
bar while a restore takes long; and what is not saved.

Programs under absl's `app.run` log all events at INFO; others, as absl starts with warnings only, would show nothing of
a save. Process 0 tells it there, on standard error. Where the log shows it already, nothing is said twice.
"""

from __future__ import annotations

import contextlib
import logging as python_logging
import sys
import time
from collections.abc import Callable, Iterator

from absl import logging

from orchestrator.observe import events
from orchestrator.observe.bar import Bar, Pace
from orchestrator.texts import size

APART_S = 1.0  # between two lines of saves, at least
RESTORING_S = 10.0  # between two lines of one restore, where no bar can be drawn
_speaking: list[ProgressLines] = []  # of all agents of this process: events do not say whose they are


class ProgressLines:
    """Tells what `on_event` hears, any thread. `close` ends it. `clock`: in seconds. `bars`: whether a line can be
    drawn over; else restores are told of in lines."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic, *, bars: bool = False
    ) -> None:
        self._say, self._clock, self._bars = say, clock, bars
        self._restoring: _Restoring | None = None
        self._said_s: float | None = None
        self._waiting: list[events.SaveCommitted] = []  # not told yet, as another was told just now
        self._blocked: tuple[int, float] | None = None  # the step being saved, and for how long training stood
        self._in_flight: int | None = None  # whether it will be saved, nobody knows yet
        self._newest: int | None = None  # that counts
        self._from_store = True  # whether that one is in it; a held step is not
        _speaking.append(self)

    def on_event(self, event: events.Event) -> None:
        if _speaking[:1] != [self]:  # an older agent of this process tells it
            return
        match event:
            case events.SaveStarted():
                self._blocked, self._in_flight = (event.step, event.blocked_s), event.step
            case events.RestorePhase(phase=events.READING):
                self._restoring = self._restoring or _Restoring(event, self._say, self._clock, bars=self._bars)
                self._restoring.reach(event.read_bytes, event.total_bytes or None)
            case events.RestorePhase():
                self._end_restoring()
            case events.StepRestored():
                self._newest, self._from_store = event.step, event.source == "store"
                more = "" if self._from_store else f" from {event.source}"
                self._say(f"restored step {event.step}: {size(event.read_bytes)}{more} in {event.elapsed_s:.1f} s")
            case events.SaveNotCommitted():
                self._ended(event.step)
            case events.SaveCommitted():
                self._newest, self._from_store = event.step, True
                self._ended(event.step)
                self._waiting.append(event)
                if self._said_s is None or self._clock() - self._said_s >= APART_S:
                    self._flush()
            case events.Closed():
                self._flush()
                if self._in_flight is None and self._from_store and (line := _not_saved(event, self._newest)):
                    self._say(line)

    def _ended(self, step: int) -> None:
        self._in_flight = None if self._in_flight == step else self._in_flight

    def _end_restoring(self) -> None:
        if self._restoring:
            self._restoring.close()
        self._restoring = None

    def _flush(self) -> None:
        if self._waiting:
            self._say(_saved(self._waiting[-1], len(self._waiting) - 1, self._blocked))
            self._waiting, self._said_s = [], self._clock()

    def close(self) -> None:
        """Idempotent."""
        self._end_restoring()
        if self in _speaking:
            self._flush()
            _speaking.remove(self)


class _Restoring:
    """One reading of a step's arrays, as a bar or in lines."""

    def __init__(
        self, first: events.RestorePhase, say: Callable[[str], None], clock: Callable[[], float], *, bars: bool
    ) -> None:
        self._about, self._say, self._clock = f"restoring step {first.step}", say, clock
        self._bar = Bar(self._about, None, since_s=first.elapsed_s) if bars else None
        self._pace = Pace("bytes", None, clock, first.elapsed_s)
        self._said_s = clock()

    def reach(self, read_bytes: int, total_bytes: int | None) -> None:
        if self._bar:
            self._bar.reach(read_bytes, total_bytes)
            return
        self._pace.reach(read_bytes, total_bytes)
        if self._clock() - self._said_s >= RESTORING_S:
            self._said_s = self._clock()
            self._say(f"{self._about}: {self._pace}")

    def close(self) -> None:
        if self._bar:
            self._bar.close()


@contextlib.contextmanager
def telling(progress: bool | None) -> Iterator[None]:
    """Tell, as long as this is open, where `wanted`: for a reader, who has no agent."""
    if not wanted(progress, 0):
        yield
        return
    lines = ProgressLines(say, bars=person_sits())
    stop = events.subscribe(lines.on_event)
    try:
        yield
    finally:
        stop()
        lines.close()


def wanted(progress: bool | None, process: int) -> bool:
    """Whether this process tells it: as `Options.progress` says; if that is None, where a person sits."""
    return process == 0 and (person_sits() if progress is None else progress)


def say(line: str) -> None:
    """On standard error, unless the log shows such lines there."""
    if shown_by_log():
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
        print(line, file=sys.stderr, flush=True)


def shown_by_log() -> bool:
    """Whether what absl logs at INFO reaches the terminal."""
    logger: python_logging.Logger | None = logging.get_absl_logger()
    if logger is None or not logger.isEnabledFor(python_logging.INFO):
        return False
    while logger:
        if any(_shows(handler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _shows(handler: python_logging.Handler) -> bool:
    if handler.level > python_logging.INFO:
        return False
    if isinstance(handler, logging.ABSLHandler):
        handler = handler.python_handler
    console = getattr(handler, "console", None)  # of rich's handler
    return getattr(console, "file", getattr(handler, "stream", None)) in (sys.stderr, sys.stdout)


def person_sits() -> bool:
    """A terminal, or IPython, whose cells show standard error."""
    with contextlib.suppress(AttributeError, ValueError):  # none, or closed
        if sys.stderr.isatty():
            return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _saved(event: events.SaveCommitted, before: int, blocked: tuple[int, float] | None) -> str:
    stood = f", blocked {blocked[1]:.2f} s" if blocked and blocked[0] == event.step else ""
    more = f", and {before} before it" if before else ""
    return f"saved step {event.step}{more}: {size(event.state_bytes)} in {event.elapsed_s:.1f} s{stood}"


def _not_saved(event: events.Closed, newest: int | None) -> str:
    """Of the steps that training has reached since the last save; '' if there are none. Where saves have failed, that
    was said."""
    last = event.last_step
    if event.failures or last <= (-1 if newest is None else newest):
        return ""
    first = last if newest is None else newest + 1
    those = f"step {last} is" if first == last else f"steps {first} to {last} are"
    known = "no step is" if newest is None else f"the newest that is: {newest}"
    return f"{those} not saved: {known}; save(..., force=True) saves the last"

"""What happened, as typed values, written in one place. Log events, not sentences.

`emit` may be called from any thread. The line goes to absl logging; `subscribe` adds further readers (tests, metrics).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from absl import logging


@dataclass(frozen=True)
class EpochOpened:
    epoch: int
    root: str
    process_count: int


@dataclass(frozen=True)
class SaveStarted:
    step: int
    attempt: str
    blocked_s: float


@dataclass(frozen=True)
class Committed:
    step: int
    attempt: str
    elapsed_s: float
    state_bytes: int


@dataclass(frozen=True)
class SaveNotCommitted:
    step: int
    attempt: str
    reason: str


@dataclass(frozen=True)
class Restored:
    step: int
    attempt: str
    elapsed_s: float
    read_bytes: int


@dataclass(frozen=True)
class SteppedDown:
    step: int
    attempt: str
    reason: str


@dataclass(frozen=True)
class Collected:
    attempts: int
    deleted_bytes: int
    failed: int


@dataclass(frozen=True)
class StoreRetried:
    """A request to an object store got no usable answer and is made again. `tries`: so far."""

    operation: str
    name: str
    reason: str
    tries: int
    wait_s: float


Event = EpochOpened | SaveStarted | Committed | SaveNotCommitted | Restored | SteppedDown | Collected | StoreRetried
_WARNINGS = (SaveNotCommitted, SteppedDown)
_readers: list[Callable[[Event], None]] = []


def emit(event: Event) -> None:
    """Log `event` as `name key=value ...` and hand it to every subscriber."""
    text = " ".join(f"{field.name}={_text(getattr(event, field.name))}" for field in fields(event))
    log = logging.warning if isinstance(event, _WARNINGS) else logging.info
    log("%s %s", type(event).__name__, text)
    for reader in tuple(_readers):
        reader(event)


def subscribe(reader: Callable[[Event], None]) -> Callable[[], None]:
    """Call `reader` with every later event, on the emitting thread. Returns what ends the subscription."""
    _readers.append(reader)
    return lambda: _readers.remove(reader)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return repr(value) if isinstance(value, str) and " " in value else str(value)

"""Which requests came when, and how deep their chains were: what a store far away makes its clients wait for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT = 20_000  # the newest requests


@dataclass
class LoggedRequest:
    """One request. Times in seconds on a monotonic clock; `ended_s` is None while it is under way."""

    operation: str
    name: str
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None


class RequestLog:
    """The newest requests, in the order in which they came."""

    def __init__(self) -> None:
        self._kept: deque[LoggedRequest] = deque(maxlen=KEPT)

    @contextmanager
    def record(self, operation: str, name: str) -> Iterator[LoggedRequest]:
        one = LoggedRequest(operation, name)
        self._kept.append(one)
        try:
            yield one
        finally:
            one.ended_s = time.monotonic()

    def clear(self) -> None:
        self._kept.clear()

    def as_json(self) -> list[dict[str, Any]]:
        """As `/_emulator/requests` answers."""
        return [asdict(one) for one in self._kept]


def chain(requests: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The longest chain out of these (`as_json`) in which each began after the one before it was answered: as many
    latencies as were waited for, however much was done beside. What is still under way is left out."""
    found: list[Mapping[str, Any]] = []
    for one in sorted((one for one in requests if one["ended_s"] is not None), key=lambda one: float(one["ended_s"])):
        if not found or one["began_s"] >= found[-1]["ended_s"]:
            found.append(one)
    return found

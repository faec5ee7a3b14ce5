"""Which requests came when, and how deep their chains were: what a store far away makes its clients wait for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT = 20_000  # the newest requests


@dataclass
class Logged:
    """One request. Times in seconds on a monotonic clock; `ended_s` is infinite while it is under way."""

    operation: str
    name: str
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = float("inf")


class RequestLog:
    """The newest requests, in the order in which they came."""

    def __init__(self) -> None:
        self._kept: deque[Logged] = deque(maxlen=KEPT)

    @contextmanager
    def noted(self, operation: str, name: str) -> Iterator[Logged]:
        one = Logged(operation, name)
        self._kept.append(one)
        try:
            yield one
        finally:
            one.ended_s = time.monotonic()

    def clear(self) -> None:
        self._kept.clear()

    def told(self) -> list[dict[str, Any]]:
        """As JSON; what is under way ends now."""
        now = time.monotonic()
        return [asdict(one) | {"ended_s": min(one.ended_s, now)} for one in self._kept]


def waves(requests: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The longest chain out of these (began, ended) in which each began after the one before it was answered: where
    every request takes the same time, what came of it is that many times this latency, however much was done beside."""
    chain: list[tuple[float, float]] = []
    for began, ended in sorted(requests, key=lambda one: one[1]):
        if not chain or began >= chain[-1][1]:
            chain.append((began, ended))
    return chain

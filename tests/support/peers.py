"""A job of two processes of which only one is real: the test says what the other one answers in each round."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Theirs = Callable[[str, Any], Any]  # (name of the round, this process's message) -> the other process's


class OfTwo:
    """The rendezvous of `process`, 0 or 1, with a process that answers `theirs`. Messages pass through JSON, as they do
    between real ones. met: names of the rounds so far. sent: this process's last message in each."""

    count = 2

    def __init__(self, theirs: Theirs, process: int = 0) -> None:
        self.process, self.theirs = process, theirs
        self.hosts = {0: "host-0", 1: "host-1"}
        self.met: list[str] = []
        self.sent: dict[str, Any] = {}

    def _meets(self, name: str, value: Any) -> None:
        self.met.append(name)
        self.sent[name] = value

    def broadcast(self, name: str, value: Any, timeout_s: float) -> Any:
        self._meets(name, value)
        return json.loads(json.dumps(value if self.process == 0 else self.theirs(name, value)))

    def gather(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        self._meets(name, value)
        both = [value, self.theirs(name, value)]
        return json.loads(json.dumps(both if self.process == 0 else both[::-1]))

    def preempted(self, step: int) -> bool:
        return False

    def post(self, key: str, value: str) -> None: ...

    def forget(self, prefix: str) -> None: ...

    def poll(self, prefix: str) -> dict[str, str]:
        return {}


def same(name: str, value: Any) -> Any:
    """The other process answers as this one does."""
    return value

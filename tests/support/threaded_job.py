"""A job whose processes are threads of this one: real rounds between them, without a start of JAX for each."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from orchestrator.job.rendezvous import SingleProcess

Value = TypeVar("Value")


class ThreadedJob:
    def __init__(self, count: int) -> None:
        self.count = count
        self.messages: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        self.board: dict[str, str] = {}

    def each(self, call: Callable[[Member], Value]) -> list[Value]:
        """What `call` returns for each process, run at once."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(lambda process: call(Member(self, process)), range(self.count)))


class Member(SingleProcess):
    """The rendezvous of one process. Messages pass through JSON, as they do between real ones."""

    def __init__(self, job: ThreadedJob, process: int) -> None:
        super().__init__()
        self.job, self.process, self.count = job, process, job.count
        self.hosts = {index: f"host-{index}" for index in range(job.count)}
        self._posted = job.board

    def gather(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        self.job.messages[self.process] = json.dumps(value)
        self.job.barrier.wait()
        found = [json.loads(message) for message in self.job.messages]
        self.job.barrier.wait()
        return found

    def broadcast(self, name: str, value: Any, timeout_s: float) -> Any:
        return self.gather(name, value, timeout_s)[0]

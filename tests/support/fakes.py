"""Ports made for tests: a store that fails, waits or loses replies where it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from orchestrator.errors import StorageError
from orchestrator.job.poll import Clock
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.rules.records import FileEntry, Json
from orchestrator.storage import Created, Entry, Exists, Storage

Hook = Callable[[str, str], None]


class HookedStorage:
    """`inner`, with `before(operation, key)` called first, and `after(operation, key)` once a create has landed."""

    def __init__(self, inner: Storage, before: Hook | None = None, after: Hook | None = None) -> None:
        self.inner, self.before, self.after = inner, before, after
        self.url = inner.url
        self.calls: list[tuple[str, str]] = []

    def _call(self, operation: str, key: str) -> None:
        self.calls.append((operation, key))
        if self.before:
            self.before(operation, key)

    def create(self, key: str, body: bytes) -> Created | Exists:
        self._call("create", key)
        outcome = self.inner.create(key, body)
        if self.after:
            self.after("create", key)
        return outcome

    def get(self, key: str, *most_bytes: int) -> bytes | None:
        self._call("get", key)
        return self.inner.get(key, *most_bytes)

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        self._call("list", prefix)
        return self.inner.list(prefix, start)

    def delete(self, key: str) -> bool:
        self._call("delete", key)
        return self.inner.delete(key)

    def measure(self, key: str, *expected_bytes: int) -> FileEntry | None:
        self._call("measure", key)
        return self.inner.measure(key, *expected_bytes)

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        wanted = list(keys)
        for key in wanted:
            self._call("make_durable", key)
        return self.inner.make_durable(wanted, known)


class FailOnce:
    """A hook that rejects the first `operation` on a key that contains `part`, as a full disk would."""

    def __init__(self, operation: str, part: str) -> None:
        self.operation, self.part, self.hits = operation, part, 0

    def __call__(self, operation: str, key: str) -> None:
        if operation == self.operation and self.part in key:
            self.hits += 1
            if self.hits == 1:
                raise StorageError(f"{operation} {key}: ENOSPC (No space left on device)")


class FakeBoard:
    """A rendezvous that only carries signals, as process `process` of `count` sees it."""

    def __init__(self, process: int, count: int) -> None:
        self.process, self.count = process, count
        self.hosts = {index: f"host-{index}" for index in range(count)}
        self.posted: dict[str, str] = {}
        self.polls = 0

    def broadcast(self, name: str, value: Json, timeout_s: float) -> Json:
        raise AssertionError("a collective")

    def gather(self, name: str, value: Json, timeout_s: float) -> list[Json]:
        raise AssertionError("a collective")

    def preempted(self, step: int) -> bool:
        return False

    def post(self, key: str, value: str) -> None:
        self.posted[key] = value

    def forget(self, prefix: str) -> None:
        self.posted = {key: value for key, value in self.posted.items() if not key.startswith(prefix)}

    def poll(self, prefix: str) -> dict[str, str]:
        self.polls += 1
        return {key.removeprefix(prefix): value for key, value in self.posted.items() if key.startswith(prefix)}


class StepClock:
    """Time that only sleeping moves, and what was slept."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self.clock = Clock(lambda: self.now_s, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def after(self, seconds: float, value: str = "there") -> Callable[[], str | None]:
        """A look that answers `seconds` after now."""
        until = self.now_s + seconds
        return lambda: value if self.now_s >= until else None


def another_host() -> SingleProcess:
    """For an agent that is to be another process's incarnation, though it is in this one."""
    me = SingleProcess()
    me.hosts = {0: "another-host"}
    return me

"""A store that answers in waves: no request of one is answered before all of it are under way.

So what is asked at the same time is shown without a clock: code that waits for one answer before it asks for the next
stops here, and is told what was missing.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from orchestrator.errors import StorageError
from orchestrator.rules.records import FileEntry
from orchestrator.storage import Storage
from tests.support.fakes import HookedStorage

LIMIT_S = 30.0  # only code that asks for one thing after another ever waits for so long


class InWaves(HookedStorage):
    """`inner`, which answers at once outside of `expecting`."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, before=self._wait)
        self._changed = threading.Condition()
        self._waves: list[list[str]] = []  # patterns of the requests that have not come yet
        self._now = 0
        self.unexpected: list[str] = []
        self.late: list[str] = []

    @contextmanager
    def expecting(self, *waves: Sequence[str]) -> Iterator[None]:
        """These waves of requests, each `operation key` as a regular expression, and no others until all are met."""
        with self._changed:
            self._waves, self._now = [list(wave) for wave in waves], 0
        try:
            yield
        finally:
            with self._changed:
                missing, self._waves = [wave for wave in self._waves if wave], []
                self._changed.notify_all()
        assert not self.late, f"one after the other: {self.late}"
        assert not missing, f"never asked for: {missing}"
        assert not self.unexpected, f"asked for as well: {self.unexpected}"

    def _wait(self, operation: str, key: str) -> None:
        request = f"{operation} {key}"
        with self._changed:
            if self._now >= len(self._waves):  # what comes after the last is no matter: what is done in the background
                return
            mine = self._take(request)
            if mine is None:
                self.unexpected.append(request)
                return
            self._advance()
            if not self._changed.wait_for(lambda: not self._waves or self._now > mine, LIMIT_S):
                self.late.append(f"{request} waits for {self._waves[self._now]}")
                raise StorageError(f"{request}: {self._waves[self._now]} was not asked for meanwhile")

    def _take(self, request: str) -> int | None:
        """Which wave it is of: the first from now on that has it."""
        for number in range(self._now, len(self._waves)):
            for pattern in self._waves[number]:
                if re.fullmatch(pattern, request):
                    self._waves[number].remove(pattern)
                    return number
        return None

    def _advance(self) -> None:
        while self._now < len(self._waves) and not self._waves[self._now]:
            self._now += 1
        self._changed.notify_all()

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        wanted = list(keys)  # one request, whatever it is of
        self._wait("make_durable", " ".join(key.rpartition("/")[2] for key in wanted))
        return self.inner.make_durable(wanted, known)

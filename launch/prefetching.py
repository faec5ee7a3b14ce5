"""`orchestrator prefetch` on each host of a restart, beside the start of its process. Whatever becomes of it is said,
and changes nothing: what it has not brought, the restore reads from where it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from launch import warden
from launch.hosts import REAP_S, Orphans, Warden

NICE = 5  # the host's own process comes first
_ANSWER_BYTES = 1 << 20


@dataclass
class _Running:
    host: int
    process: subprocess.Popen[bytes]
    answer: IO[bytes]
    since: float


@dataclass(frozen=True)
class Outcome:
    """found: what the command prints with --json; {} if it has not got so far."""

    host: int
    code: int
    seconds: float
    found: Mapping[str, Any]

    def describe(self) -> str:
        if not self.found:
            return f"host-{self.host} could not prefetch (code {self.code}): left to the restore"
        if self.found["step"] is None:
            return f"host-{self.host} has nothing to prefetch"
        peers, store = self.found["peers_bytes"], self.found["store_bytes"]
        more = f"; {len(self.found['problems'])} files are left to the restore" if self.found["problems"] else ""
        what = f"step {self.found['step']} ({self.found['kind']})"
        got = f"{peers} bytes from peers, {store} from the store"
        return f"host-{self.host} prefetched {what} in {self.seconds:.1f} s: {got}{more}"


class Prefetching:
    """Those of one start. Leaving the context ends what still runs. One thread."""

    def __init__(self, root: str | None, warden: Warden, orphans: Orphans) -> None:
        self._root, self._warden, self._orphans = root, warden, orphans
        self._running: list[_Running] = []

    def __enter__(self) -> Prefetching:
        return self

    def start(self, host: int, environ: Mapping[str, str]) -> None:
        """Nothing where nobody has told the launcher where the run is."""
        if not self._root:
            return
        first = ["nice", "-n", str(NICE)] if shutil.which("nice") else []
        command = [*first, sys.executable, "-P", "-m", "orchestrator", "prefetch", self._root, "--json"]
        answer = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **environ},
                start_new_session=True,
            )
        except OSError:
            answer.close()
            return
        self._orphans.ours.add(process.pid)
        mark = f"prefetch {process.pid}".encode()  # nobody else has it: its session tells what is its own
        self._warden.guard(warden.identity_of(process.pid, mark))
        self._running.append(_Running(host, process, answer, time.monotonic()))

    def ended(self) -> Iterator[Outcome]:
        """What has become of those that have ended since the last call."""
        for one in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(one)
            self._forget(one)
            one.answer.seek(0)
            text = one.answer.read(_ANSWER_BYTES)
            one.answer.close()
            found: dict[str, Any] = {}
            with suppress(ValueError):
                found = json.loads(text)
            yield Outcome(one.host, one.process.returncode, time.monotonic() - one.since, found)

    def _forget(self, one: _Running) -> None:
        self._warden.release(one.process.pid)
        self._orphans.ours.discard(one.process.pid)

    def __exit__(self, *_: object) -> None:
        for one in self._running:
            one.process.kill()  # it has started nothing
        for one in self._running:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(timeout=REAP_S)
                self._forget(one)
            one.answer.close()
        self._running.clear()

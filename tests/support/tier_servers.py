"""Tier servers for tests: programs of their own, with directories of their own, ended with the test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.run import tier_process
from orchestrator.run.tier_process import TierServer
from orchestrator.storage.peer import Peer

RUN = "0123456789abcdef"
SECRET = bytes(range(32))


class Host:
    """A host of a job: its tier's base directory, and the server for it."""

    def __init__(self, base: Path, server: TierServer) -> None:
        self.base, self.server = base, server
        self.peer = Peer(server.address, SECRET, RUN, deadline_s=10)

    @property
    def address(self) -> str:
        return self.server.address

    def part(self, process: int, run: str = RUN) -> Path:
        """The directory of a part, made."""
        path = self.base / run / f"process-{process:05d}"
        for each in (path.parent, path):
            each.mkdir(mode=0o700, exist_ok=True)
        return path

    def put(self, process: int, key: str, body: bytes) -> Path:
        path = self.part(process) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        return path


@contextmanager
def host(folder: Path, **options: object) -> Iterator[Host]:
    """folder: the tier's `directory`."""
    folder.mkdir(exist_ok=True)
    base = folder / f"orchestrator-{os.getuid()}"
    server = tier_process.start(str(base), SECRET, **options)  # type: ignore[arg-type]
    made = Host(base, server)
    try:
        yield made
    finally:
        made.peer.close()
        server.close()

"""Tier servers for tests: programs of their own, with directories of their own, ended with the test."""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.rules import peer_protocol
from orchestrator.rules.peer_protocol import Request, Secret
from orchestrator.run import tier_process, tier_server
from orchestrator.run.tier_process import TierServer
from orchestrator.run.tier_shelf import Shelf
from orchestrator.storage import PosixStorage
from orchestrator.storage.peer import Peer

RUN = "0123456789abcdef"
SECRET = bytes(range(32))


class Place:
    """A host's tier: its base directory, and the server for it, as another host reaches it."""

    def __init__(self, base: Path, address: str) -> None:
        self.base, self.address = base, address
        self.peer = Peer(address, SECRET, RUN, deadline_s=10)

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


class Host(Place):
    """One whose server is a program of its own."""

    def __init__(self, base: Path, server: TierServer) -> None:
        super().__init__(base, server.address)
        self.server = server


@contextmanager
def host(folder: Path, **options: Any) -> Iterator[Host]:
    """folder: the tier's `directory`."""
    folder.mkdir(exist_ok=True)
    base = folder / f"orchestrator-{os.getuid()}"
    server = tier_process.start(str(base), SECRET, **options)
    made = Host(base, server)
    try:
        yield made
    finally:
        made.peer.close()
        server.close()


class InThread(Place):
    """One whose server is a thread of this process, with bounds of the test's choice."""

    def __init__(self, folder: Path, stall_s: float, idle_s: float, connections_max: int, **options: Any) -> None:
        base = folder / f"orchestrator-{os.getuid()}"
        shelf = Shelf(str(base), **options)
        shelf.prepare()
        self._handler = tier_server.Handler(shelf, SECRET, stall_s)
        self._listening = tier_server.listen("127.0.0.1:0")
        self.port = int(self._listening.getsockname()[1])
        super().__init__(base, f"127.0.0.1:{self.port}")
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(idle_s, connections_max), name="tier server")
        self._thread.start()

    def _run(self, idle_s: float, connections_max: int) -> None:
        async def serve() -> None:
            async with tier_server.serving(self._handler, self._listening, idle_s, connections_max):
                await self._ended.wait()

        self._loop.run_until_complete(serve())
        self._loop.close()

    def close(self) -> None:
        self.peer.close()
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(20)
        self._handler.close()


@contextmanager
def in_thread(
    folder: Path, stall_s: float = 5.0, idle_s: float = 5.0, connections_max: int = 8, **options: Any
) -> Iterator[InThread]:
    folder.mkdir(exist_ok=True)
    made = InThread(folder, stall_s, idle_s, connections_max, **options)
    try:
        yield made
    finally:
        made.close()


def header(request: Request, secret: bytes = SECRET, at_s: float | None = None, **more: str) -> bytes:
    """A signed request, as it is sent, but for its body."""
    signed = request.authorize(Secret(secret), int(time.time() if at_s is None else at_s), secrets.token_hex(16))
    lines = {"Host": "tier", peer_protocol.AUTHORIZATION: signed, "Connection": "close"}
    lines |= {"Range": request.range} if request.range else {}
    lines |= {"Content-Length": str(request.body_bytes)} if request.body_bytes else {}
    lines |= {name.replace("_", "-"): value for name, value in more.items()}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{request.method} {request.target} HTTP/1.1\r\n{text}\r\n".encode("utf-8", "surrogateescape")


def ask(address: str, *sent: bytes, deadline_s: float = 20.0, close: bool = False) -> bytes:
    """What comes back for these bytes until the other side closes. close: this one says that no more will come."""
    host_name, _, port = address.rpartition(":")
    answer = b""
    with socket.create_connection((host_name, int(port)), deadline_s) as raw, suppress(ConnectionError):
        for piece in sent:
            raw.sendall(piece)
        if close:
            with suppress(OSError):  # the other side has closed already
                raw.shutdown(socket.SHUT_WR)
        while more := raw.recv(1 << 16):
            answer += more
    return answer


def status(answer: bytes) -> int:
    """Of an answer; 0 if there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


class Fake:
    """Whoever answers at an address. behave: told each connection, and the header of each request on it; False: it is
    closed then."""

    def __init__(self, behave: Callable[[socket.socket, bytes], bool]) -> None:
        self._behave, self._listening = behave, socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.requests: list[bytes] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listening.accept()
                self._open.append(raw)
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with suppress(OSError), raw:
            while True:
                text = b""
                while not text.endswith(b"\r\n\r\n"):
                    if not (more := raw.recv(1)):
                        return
                    text += more
                self.requests.append(text)
                if not self._behave(raw, text):
                    return

    def close(self) -> None:
        for raw in (self._listening, *self._open):
            with suppress(OSError):
                raw.shutdown(socket.SHUT_RDWR)
            raw.close()


@contextmanager
def fake(behave: Callable[[socket.socket, bytes], bool]) -> Iterator[Fake]:
    made = Fake(behave)
    try:
        yield made
    finally:
        made.close()


def answer(request: bytes, code: int, length: int, secret: bytes = SECRET, **more: str) -> bytes:
    """The header of an answer with a proof."""
    nonce = request.partition(b"orchestrator-tier-1 ")[2].split(b" ")[1].decode()
    proof = peer_protocol.prove(Secret(secret), nonce, code, length)
    lines = {"Content-Length": str(length), peer_protocol.PROOF: proof, **more}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {code} X\r\n{text}\r\n".encode()


@functools.cache
def _session() -> tuple[Path, TierServer]:
    folder = Path(tempfile.mkdtemp()) / f"orchestrator-{os.getuid()}"
    server = tier_process.start(str(folder), SECRET)

    def end() -> None:
        server.close()
        shutil.rmtree(folder.parent, ignore_errors=True)

    atexit.register(end)
    return folder, server


_numbers = itertools.count()


class Served:
    """A store that is written to as a directory, and read through a tier server of the test session's: as another host
    reads it."""

    def __init__(self) -> None:
        folder, server = _session()
        process = next(_numbers)
        for path in (folder / RUN, folder / RUN / peer_protocol.part_name(process)):
            path.mkdir(mode=0o700, exist_ok=True)
        self.storage = PosixStorage(str(path))
        self.part = Peer(server.address, SECRET, RUN).part(process)
        self.url = self.part.url
        self.get, self.list, self.measure = self.part.get, self.part.list, self.part.measure
        self.size, self.read_into = self.part.size, self.part.read_into
        self.create, self.delete, self.make_durable = (
            self.storage.create,
            self.storage.delete,
            self.storage.make_durable,
        )

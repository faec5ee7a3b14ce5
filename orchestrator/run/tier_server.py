"""The tier server: a program that gives the held steps of this host to the job's other hosts, and takes their copies.

    ORCHESTRATOR_TIER_SECRET=... python -m orchestrator.run.tier_server --directory /dev/shm/orchestrator-1000

One per host, with an interpreter of its own: no byte that it serves, takes or sends passes through training's. It
imports neither JAX nor what needs it. Without the variable, the secret is the first line of standard input; when that
ends, or the process that started it is gone, so does the server (not if --detached). When it listens, it prints one
line, {"address": "127.0.0.1:41234", "pid": 7}.

Nothing is done for a request before its signature is verified (`rules/peer_protocol`), and everything is bounded:
connections, headers, bodies, and how long a peer may say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging as python_logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import BinaryIO, TypeVar

from absl import flags, logging
from aiohttp import web

from orchestrator import environment
from orchestrator.errors import Damaged, OrchestratorError, StorageError, Unavailable, UsageError
from orchestrator.rules import peer_protocol
from orchestrator.rules.peer_protocol import (
    Failure,
    ListPage,
    Measured,
    Parts,
    Secret,
    Sending,
    Signed,
    Target,
    Unsigned,
)
from orchestrator.rules.records import crc32c
from orchestrator.run import tier_bodies
from orchestrator.run.tier_sending import Sender
from orchestrator.run.tier_shelf import Copy, Rejected, Shelf

CONNECTIONS_MAX = 4096  # all processes of a large job read process 0's log at once
_BACKLOG = 1024
IDLE_S = 60.0  # of a connection without a request, also one that is still sending its header
STALL_S = 30.0  # in which a peer must take or send at least a piece
_PIECE_BYTES = 1 << 20
_SMALL_BYTES = 256 << 10  # sent with the header
_PAGE_ENTRIES = 10_000
_THREADS = 8  # that list and measure files
_TAKES_MAX = 32  # copies that arrive at the same time: each has a thread, and a further one waits
_SWEEP_S = 60.0
_END_S = 1.0  # for what is being sent or taken when the server ends
_STATUS = {
    "missing": 404, "unsafe": 400, "bad": 400, "conflict": 409, "fenced": 409, "room": 507, "damaged": 422,
    "clock": 403, "secret": 403, "busy": 503,
}  # fmt: skip
_SERVER = {"Server": "tier"}  # strangers need not know versions
Value = TypeVar("Value")


class Handler:
    """Requests of one server."""

    def __init__(self, shelf: Shelf, secret: bytes, stall_s: float = STALL_S) -> None:
        self._shelf, self._secret, self._stall_s = shelf, Secret(secret), stall_s
        self._sender = Sender(shelf, secret, stall_s)
        self._files = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")
        self._takes = ThreadPoolExecutor(_TAKES_MAX, thread_name_prefix="take")
        self._follow = ThreadPoolExecutor(_TAKES_MAX, thread_name_prefix="follow")
        self.idle_since: dict[object, float] = {}  # by connection; infinite while a request is answered

    def close(self) -> None:
        self._sender.close()
        for pool in (self._files, self._takes, self._follow):
            pool.shutdown(wait=False, cancel_futures=True)

    async def sweep(self) -> None:
        while True:
            await self._in_thread(self._shelf.sweep)
            await asyncio.sleep(_SWEEP_S)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self.idle_since[connection] = math.inf
        try:
            return await self._handle(request)
        finally:
            self.idle_since[connection] = time.monotonic()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        headers = request.headers
        signed = peer_protocol.verify(
            self._secret,
            request.method,
            request.raw_path,
            headers.get("Range", ""),
            headers.get(peer_protocol.AUTHORIZATION, ""),
            time.time(),
        )
        if isinstance(signed, Unsigned):
            logging.log_every_n_seconds(logging.WARNING, "%s: rejected: %s", 10, request.remote, signed.reason)
            if signed.nonce:
                return self._failed(request, Signed(signed.nonce, 0, ""), Failure("clock", signed.reason))
            response = web.Response(status=403, body=b"", headers=_SERVER)
            response.force_close()
            return response
        try:
            target = peer_protocol.parse_target(request.raw_path)
            return await self._serve(request, signed, target)
        except (Rejected, OrchestratorError) as error:
            return self._failed(request, signed, _failure(error))
        except (ConnectionError, TimeoutError):  # an answer that has begun was cut off
            raise
        except Exception as error:  # a fault of ours: whoever asks is told, and takes another source
            logging.exception("%s %s", request.method, request.raw_path[:200])
            return self._failed(request, signed, Failure("unavailable", f"{type(error).__name__}: {error}"))

    async def _serve(self, request: web.BaseRequest, signed: Signed, target: Target) -> web.StreamResponse:
        what = (request.method, target.process is not None, bool(target.key), *target.query)
        match what:
            case ("GET", False, False):
                return await self._parts(signed, target)
            case ("GET", True, False, "list", "start"):
                return await self._list(signed, target)
            case ("GET", True, True):
                return await self._get(request, signed, target)
            case ("HEAD", True, True):
                return await self._size(signed, target)
            case ("GET", True, True, "measure"):
                return await self._measure(signed, target)
            case ("PUT", True, True) | ("PUT", True, True, "slowest"):
                return await self._take(request, signed, target)
            case ("PUT", False, False, "epoch") if target.query["epoch"].isdecimal():
                await self._in_thread(self._shelf.announce, target.run, int(target.query["epoch"][:18]))
                return self._reply(signed, 200, b"")
            case ("POST", True, False):
                return await self._send(request, signed, target)
        raise Rejected("bad", f"{request.method} {target.path}: is nothing that a tier server does")

    async def _in_thread(self, call: Callable[..., Value], *args: object) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._files, functools.partial(call, *args))

    # Answers.

    def _reply(self, signed: Signed, status: int, body: bytes) -> web.Response:
        proof = peer_protocol.prove(self._secret, signed.nonce, status, len(body))
        return web.Response(status=status, body=body, headers={peer_protocol.PROOF: proof, **_SERVER})

    def _failed(self, request: web.BaseRequest, signed: Signed, failure: Failure) -> web.Response:
        body = peer_protocol.encode(failure)
        response = self._reply(signed, _STATUS.get(failure.kind, 500), body)
        if request.body_exists and not request.content.is_eof():
            response.force_close()  # after a moment in which its body is thrown away, so that it reads the answer
        return response

    def _begun(self, signed: Signed, status: int, length: int | None) -> web.StreamResponse:
        proof = peer_protocol.prove(self._secret, signed.nonce, status, length)
        response = web.StreamResponse(status=status, headers={peer_protocol.PROOF: proof, **_SERVER})
        response.content_type = "application/octet-stream"
        response.content_length = length
        return response

    async def _parts(self, signed: Signed, target: Target) -> web.Response:
        found = await self._in_thread(self._shelf.parts, target.run)
        body = Parts({process: [(each.step, each.name) for each in attempts] for process, attempts in found.items()})
        return self._reply(signed, 200, peer_protocol.encode(body))

    async def _list(self, signed: Signed, target: Target) -> web.Response:
        def listed() -> ListPage:
            entries: list[tuple[str, int, str]] = []
            for entry in self._shelf.part(target).list(target.query["list"], target.query["start"]):
                if len(entries) == _PAGE_ENTRIES:
                    return ListPage(entries, more=True)
                entries.append((entry.key, entry.bytes, entry.problem))
            return ListPage(entries)

        return self._reply(signed, 200, peer_protocol.encode(await self._in_thread(listed)))

    async def _measure(self, signed: Signed, target: Target) -> web.Response:
        def measured() -> Measured:
            os.close(self._shelf.open(target)[0])
            found = self._shelf.part(target).measure(target.key)
            if found is None:
                raise Rejected("missing", "there is no such file here")
            return Measured(found.bytes, found.crc32c, found.crc32)

        return self._reply(signed, 200, peer_protocol.encode(await self._in_thread(measured)))

    async def _size(self, signed: Signed, target: Target) -> web.StreamResponse:
        descriptor, size = self._shelf.open(target)  # faster than a thread: a tier is in memory, or on a local disk
        os.close(descriptor)
        return self._begun(signed, 200, size)

    async def _get(self, request: web.BaseRequest, signed: Signed, target: Target) -> web.StreamResponse:
        descriptor, size = self._shelf.open(target)  # faster than a thread: a tier is in memory, or on a local disk
        with open(descriptor, "rb", buffering=0) as file:
            first, count, status = 0, size, 200
            if text := request.headers.get("Range"):
                asked = peer_protocol.parse_range(text)
                if asked is None or asked[0] >= size:
                    return self._reply(signed, 416, peer_protocol.encode(Failure("bad", f"the file has {size} bytes")))
                first, count, status = asked[0], min(asked[1], size - asked[0]), 206
            if count <= _SMALL_BYTES:
                body = os.pread(file.fileno(), count, first)
                return self._reply(signed, status, body)
            response = self._begun(signed, status, count)
            await response.prepare(request)
            await self._send_file(request.transport, file, first, first + count)
            await response.write_eof()
            return response

    async def _send_file(
        self, transport: asyncio.Transport | None, file: BinaryIO | FileIO, first: int, end: int
    ) -> None:
        """Bytes from `first` to `end`, from the page cache. Raises ConnectionResetError where not all of them go out;
        the connection is gone then: nothing else may follow them, and they must not look whole."""
        loop, sent = asyncio.get_running_loop(), first
        if transport is None:
            raise ConnectionResetError("the reader is gone")
        try:
            while sent < end:
                async with asyncio.timeout(self._stall_s):
                    more = await loop.sendfile(transport, file, sent, min(_PIECE_BYTES, end - sent))
                if not more:
                    raise ConnectionResetError("the file was cut short")
                sent += more
        except TimeoutError:
            raise ConnectionResetError("the reader takes nothing") from None
        finally:
            if sent < end:
                transport.abort()

    # Copies.

    async def _take(self, request: web.BaseRequest, signed: Signed, target: Target) -> web.StreamResponse:
        size = signed.body_bytes
        if request.content_length != size or "Transfer-Encoding" in request.headers:
            raise Rejected("bad", f"{size} bytes are signed, {request.content_length} are declared")
        copy = Copy(Target(target.run, target.process, target.key), size, signed.crc32c)
        loop = asyncio.get_running_loop()
        if tier_bodies.is_small(size):
            body = await tier_bodies.small(request, size, self._stall_s, _slowest(target))
            await loop.run_in_executor(self._takes, self._shelf.take, copy, iter([body]))
            return self._reply(signed, 200, b"")
        taken = tier_bodies.Taken(request, size, self._stall_s, _slowest(target))
        try:
            try:
                await loop.run_in_executor(self._takes, self._shelf.take, copy, taken.pieces())
                response = self._reply(signed, 200, b"")
            except (Rejected, OrchestratorError) as error:
                response = self._failed(request, signed, _failure(error))
            response.force_close()
            await response.prepare(request)
            await response.write_eof()
            if taken.unread:
                await loop.run_in_executor(self._takes, taken.throw_away)
            return response
        finally:
            taken.close()

    async def _send(self, request: web.BaseRequest, signed: Signed, target: Target) -> web.StreamResponse:
        if signed.body_bytes > peer_protocol.BODY_BYTES_MAX or request.content_length != signed.body_bytes:
            raise Rejected("bad", f"a request of {signed.body_bytes} bytes")
        body = await tier_bodies.small(request, signed.body_bytes, self._stall_s, _slowest(target))
        sending = peer_protocol.decode(body, Sending)
        if sending is None or crc32c(body) != signed.crc32c:
            raise Rejected("bad", "no list of files to send")
        for key in sending.keys:
            peer_protocol.parse_target(Target(target.run, target.process, key).encode())
        response = self._begun(signed, 200, None)
        response.enable_chunked_encoding()
        await response.prepare(request)
        cancelled = threading.Event()
        lines = self._sender.run(target, sending, cancelled)
        loop = asyncio.get_running_loop()
        try:
            while (progress := await loop.run_in_executor(self._follow, next, lines, None)) is not None:
                async with asyncio.timeout(self._stall_s):
                    await response.write(peer_protocol.encode(progress) + b"\n")
        finally:
            cancelled.set()
        with contextlib.suppress(ConnectionResetError):  # who has read the last line may be gone
            await response.write_eof()
        return response


def _failure(error: Rejected | OrchestratorError) -> Failure:
    """As it is answered."""
    if isinstance(error, Rejected):
        return error.failure
    kind = "unavailable" if isinstance(error, Unavailable) else "unsafe" if isinstance(error, Damaged) else "storage"
    return Failure(kind, str(error))


def _slowest(target: Target) -> int:
    """What a sender with a limit of its own says of its rate."""
    text = target.query.get("slowest", "")
    rate = int(text) if text.isdecimal() and len(text) < 10 else peer_protocol.SLOWEST_BYTES_PER_S
    return min(max(1, rate), peer_protocol.SLOWEST_BYTES_PER_S)


class _Full(asyncio.Protocol):
    """For a connection too many: it is closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, listening: socket.socket, idle_s: float = IDLE_S, connections_max: int = CONNECTIONS_MAX
) -> AsyncIterator[None]:
    """Requests to a listening socket are answered within the context."""
    server = web.Server(
        handler,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=3600.0,  # ours ends them: not all of its versions look at those that send a header slowly
        lingering_time=2.0,
        read_bufsize=_PIECE_BYTES,
    )
    loop, idle_since = asyncio.get_running_loop(), handler.idle_since

    def accept() -> asyncio.BaseProtocol:
        if len(server.connections) >= connections_max:
            return _Full()
        return server()

    async def sweep() -> None:
        while True:
            await asyncio.sleep(idle_s / 10)
            now, connections = time.monotonic(), server.connections
            for gone in idle_since.keys() - set(connections):
                del idle_since[gone]
            for connection in connections:
                if now - idle_since.setdefault(connection, now) > idle_s:
                    connection.force_close()

    accepting = await loop.create_server(accept, sock=listening, backlog=_BACKLOG)
    sweeping = asyncio.create_task(sweep())
    try:
        yield
    finally:
        sweeping.cancel()
        accepting.close()
        server.pre_shutdown()  # connections without a request
        await server.shutdown(_END_S)


def listen(address: str) -> socket.socket:
    """At an address, or at the bound socket of a descriptor that this process has inherited, `fd:N`. Raises UsageError,
    StorageError."""
    if address.startswith("fd:") and address[3:].isdecimal():
        try:
            given = socket.socket(fileno=int(address[3:]))
            given.listen(_BACKLOG)
        except OSError as error:
            raise UsageError(f"--listen={address}: is no bound socket of this process: {error.strerror}") from error
        return given
    host, port = peer_protocol.parse_address(address, "--listen")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(_BACKLOG)
        return made
    except OSError as error:
        raise StorageError(f"listen at {address}: {error.strerror or error}; choose another one") from error


async def _until_told(detached: bool) -> str:
    """Why the server ends."""
    loop = asyncio.get_running_loop()
    told: asyncio.Future[str] = loop.create_future()

    def tell(why: str) -> None:
        if not told.done():
            told.set_result(why)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell, signal.Signals(number).name)
    parent = os.getppid()
    if not detached:

        def read() -> None:
            with contextlib.suppress(OSError):
                while os.read(0, 4096):
                    pass
            loop.call_soon_threadsafe(tell, "its standard input has ended")

        threading.Thread(target=read, name="stdin", daemon=True).start()
    while not told.done():
        await asyncio.wait([told], timeout=1.0)
        if not detached and os.getppid() != parent:  # a fork of it may hold the other end of standard input
            tell("the process that started it is gone")
    return told.result()


async def _serve(handler: Handler, listening: socket.socket, detached: bool) -> None:
    address = peer_protocol.show_address(*listening.getsockname()[:2])
    async with serving(handler, listening):
        print(json.dumps({"address": address, "pid": os.getpid()}), flush=True)
        logging.info("tier server at %s", address)
        sweeping = asyncio.create_task(handler.sweep())
        why = await _until_told(detached)
        sweeping.cancel()
        logging.info("tier server at %s ends: %s", address, why)
    handler.close()


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m orchestrator.run.tier_server", description=__doc__)
    parser.add_argument("--directory", required=True, help="where tiers are: DIRECTORY/orchestrator-UID")
    parser.add_argument("--listen", default="127.0.0.1:0", help="address and port (0: any); or fd:N")
    parser.add_argument("--run", help="serve this run only")
    parser.add_argument("--detached", action="store_true", help="go on when standard input ends")
    return parser.parse_args(argv)


def _secret() -> bytes:
    text = os.environ.pop(environment.TIER_SECRET, "")
    if text:
        return peer_protocol.secret_of(text, environment.TIER_SECRET)
    line = b""  # a byte at a time: what follows is not ours to take
    while not line.endswith(b"\n") and len(line) < 4096 and (more := os.read(0, 1)):
        line += more
    return peer_protocol.secret_of(line.decode("ascii", "replace"), "the first line of standard input")


def _allow_connections() -> None:
    """As many descriptors as connections may take, as far as this user may have them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * CONNECTIONS_MAX
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def main(argv: list[str]) -> int:
    _allow_connections()
    chosen = _arguments(argv)
    python_logging.getLogger("aiohttp").setLevel(python_logging.CRITICAL)  # whoever knocks writes no log here
    try:
        shelf = Shelf(os.path.realpath(chosen.directory), chosen.run)
        secret = _secret()
        shelf.prepare()
        listening = listen(chosen.listen)
    except (UsageError, StorageError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return error.exit_code
    asyncio.run(_serve(Handler(shelf, secret), listening, chosen.detached))
    return 0


if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads that wait for a hung file system keep nobody

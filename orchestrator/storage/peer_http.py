"""Signed requests to a tier server: the standard library's client, with bounds on everything.

Connections are kept and used again by whoever comes next. A kept one may have been closed by the other side meanwhile:
then the request is made once more, on a new one; whatever is asked for may be asked for twice. Each receive waits for
at most `stall_s`, so that a peer that moves slowly is not taken for a dead one, and all of a request for at most twice
that and what its bytes take at the slowest rate that is of any use.
"""

from __future__ import annotations

import http.client
import math
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules import peer_protocol
from orchestrator.rules.peer_protocol import Failure, Request, Secret

_CONNECT_S = 10.0  # for one connection: a network that drops packets says nothing
_KEPT_MAX = 16  # connections that nobody uses
_KEPT_S = 20.0  # a server closes them after a minute
_PIECE_BYTES = 1 << 20
SendBody = Callable[[socket.socket], bool]  # False: not all of it, as the answer is there already


class _Socket(socket.socket):
    """Each receive waits for `stall_s` at most, and all of them until `deadline`."""

    stall_s = 0.0
    deadline = math.inf
    received = 0

    def recv_into(self, *args: Any) -> int:
        left_s = self.deadline - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError
            self.settimeout(min(left_s, self.stall_s))
            size = super().recv_into(*args)
        except TimeoutError:
            if left_s < self.stall_s:
                raise TimeoutError("it goes on, but too slowly to be of use") from None
            raise TimeoutError(f"no byte for {self.stall_s:g} s") from None
        self.received += size
        return size


class _Connection(http.client.HTTPConnection):
    """`used`: it has had an answer, and may have been closed since."""

    sock: _Socket
    used = False
    kept_since = 0.0
    connect_s = _CONNECT_S

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.connect_s)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = _Socket(fileno=plain.detach())


class Reply:
    """An answer whose header has been read and proven. Its body must be read within the exchange."""

    def __init__(self, response: http.client.HTTPResponse, where: str) -> None:
        self._response, self._where = response, where
        self.status, self.length = response.status, response.length

    def header(self, name: str) -> str:
        return self._response.getheader(name) or ""

    def read_into(self, view: memoryview) -> int:
        """Fill `view` with what comes. Returns how many bytes came; fewer only at the end of the body."""
        done = 0
        while done < len(view):
            count = self._response.readinto(view[done : done + _PIECE_BYTES])
            if not count:
                break
            done += count
        return done

    def read(self, most_bytes: int = peer_protocol.REPLY_BYTES_MAX) -> bytes:
        """All of it. Raises Unavailable for a body that is longer than that, or shorter than declared."""
        if self.length is None or self.length > most_bytes:
            raise Unavailable(f"{self._where}: an answer of {self.length} bytes, expected at most {most_bytes}")
        body = bytearray(self.length)
        if (got := self.read_into(memoryview(body))) != len(body):
            raise Unavailable(f"{self._where}: the answer ends after {got} of {len(body)} bytes")
        return bytes(body)

    def line(self) -> bytes:
        return self._response.readline(peer_protocol.TARGET_CHARS_MAX * 4)

    def failure(self) -> Failure:
        found = peer_protocol.decode(self.read(), Failure)
        return found or Failure("bad", f"HTTP {self.status}")

    @property
    def exhausted(self) -> bool:
        return self._response.isclosed() or self._response.length == 0


class Wire:
    """Requests to one address. Any thread."""

    def __init__(self, address: str, secret: bytes, deadline_s: float) -> None:
        self.address, self.deadline_s = address, deadline_s
        self._host, self._port = peer_protocol.parse_address(address, "a tier server's address")
        self._secret = Secret(secret)
        self._kept: list[_Connection] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """End connections that nobody uses."""
        with self._lock:
            kept, self._kept = self._kept, []
        for connection in kept:
            connection.close()

    @contextmanager
    def exchange(
        self,
        what: str,
        request: Request,
        body: bytes | SendBody = b"",
        *,
        answer_bytes: int = 0,
        stall_s: float | None = None,
        slowest_bytes_per_s: int = peer_protocol.SLOWEST_BYTES_PER_S,
        endless: bool = False,
    ) -> Iterator[Reply]:
        """The answer to a request. what: what it is for, as errors begin. answer_bytes: how much of it may be expected,
        which may take longer, by the slowest rate. stall_s: how long nothing may come; None: as always. endless: nobody
        knows how long it takes; whoever reads it bounds it. Raises Unavailable."""
        where = f"{what} http://{self.address}{request.target.partition('?')[0]}"
        stall_s = stall_s or self.deadline_s
        allowed_s = 2 * stall_s + request.body_bytes / slowest_bytes_per_s
        deadline = math.inf if endless else time.monotonic() + allowed_s
        with _as_unavailable(where, self.address):
            connection, response, sock = self._answered(where, request, body, deadline, stall_s)
        sock.deadline += min(response.length or 0, answer_bytes) / slowest_bytes_per_s
        reply = Reply(response, where)
        keep = False
        try:
            with _as_unavailable(where, self.address):
                yield reply
            keep = reply.exhausted and not response.will_close
        finally:
            response.close()
            self._keep(connection) if keep else connection.close()

    def _answered(
        self, where: str, request: Request, body: bytes | SendBody, deadline: float, stall_s: float
    ) -> tuple[_Connection, http.client.HTTPResponse, _Socket]:
        while True:
            connection = self._connection()
            kept = connection.sock  # http.client forgets it when it fails
            received = kept.received if connection.used else 0
            try:
                if not connection.used:
                    connection.connect_s = min(_CONNECT_S, stall_s)
                    connection.connect()
                sock = connection.sock  # http.client forgets it where it is to be closed after the answer
                sock.deadline, sock.stall_s = deadline, stall_s
                return connection, self._ask(where, connection, request, body), sock
            except (ConnectionError, http.client.BadStatusLine):
                stale = connection.used and kept.received == received
                connection.close()
                if not stale:
                    raise
                self.close()  # the others of its time are no better
            except BaseException:
                connection.close()
                raise

    def _ask(
        self, where: str, connection: _Connection, request: Request, body: bytes | SendBody
    ) -> http.client.HTTPResponse:
        nonce = secrets.token_hex(16)
        connection.putrequest(request.method, request.target, skip_accept_encoding=True)
        if request.range:
            connection.putheader("Range", request.range)
        if request.body_bytes or request.method in ("PUT", "POST"):
            connection.putheader("Content-Length", str(request.body_bytes))
        header = request.authorize(self._secret, int(time.time()), nonce)
        connection.putheader(peer_protocol.AUTHORIZATION, header)
        connection.sock.settimeout(connection.sock.stall_s)
        connection.endheaders(body if isinstance(body, bytes) and body else None)
        whole = True if isinstance(body, bytes) else body(connection.sock)
        response = connection.getresponse()
        connection.used = True
        if not whole:
            response.will_close = True
        length = None if response.chunked else _length(response)
        proof = response.getheader(peer_protocol.PROOF) or ""
        if not peer_protocol.proves(self._secret, nonce, response.status, length, proof):
            raise self._unproven(where, response.status)
        return response

    def _unproven(self, where: str, status: int) -> Unavailable:
        if status == 403:
            return Unavailable(
                f"{where}: the secrets differ: the tier server at {self.address} has another one than this process, or "
                "is another job's; all hosts of a job must have the same ORCHESTRATOR_TIER_SECRET"
            )
        return Unavailable(
            f"{where}: whoever answers at {self.address} (HTTP {status}) does not know the job's secret: it is no tier "
            "server of this job; nothing that it sends is used"
        )

    def _connection(self) -> _Connection:
        now = time.monotonic()
        with self._lock:
            old = [each for each in self._kept if now - each.kept_since > _KEPT_S]
            self._kept = [each for each in self._kept if now - each.kept_since <= _KEPT_S]
            found = self._kept.pop() if self._kept else None
        for each in old:
            each.close()
        return found or _Connection(self._host, self._port)

    def _keep(self, connection: _Connection) -> None:
        connection.kept_since = time.monotonic()
        with self._lock:
            if len(self._kept) < _KEPT_MAX:
                self._kept.append(connection)
                return
        connection.close()


def _length(response: http.client.HTTPResponse) -> int | None:
    """As declared: of the body that a GET would have had, too."""
    with suppress(ValueError):
        return int(response.getheader("Content-Length") or "")
    return None


@contextmanager
def _as_unavailable(where: str, address: str) -> Iterator[None]:
    """Failures of the connection, as the port reports them."""
    try:
        yield
    except TimeoutError as error:
        text = str(error) if error.errno is None else "no answer"
        raise Unavailable(
            f"{where}: {text or 'no connection'}: the host is slow, gone, or cut off", waited=True
        ) from None
    except ConnectionRefusedError:
        raise Unavailable(
            f"{where}: no tier server at {address}: its host, or the process that ran it, is gone"
        ) from None
    except (http.client.HTTPException, OSError) as error:
        text = str(error) or type(error).__name__
        raise Unavailable(f"{where}: the connection to {address} broke: {text[:200]}") from None


def raise_failure(where: str, failure: Failure) -> None:
    """Raise what the server says, as the port reports it."""
    rejected = failure.kind in ("storage", "conflict", "fenced", "room", "damaged")
    kind = StorageError if rejected else Unavailable
    raise kind(f"{where}: {failure.text}")

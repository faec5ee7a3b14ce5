"""Requests to Google Cloud Storage's JSON API: one client per process, bounded in every way.

gcsfs finds the endpoint. Its file calls are not used: their retries know neither a deadline nor a budget, and turn
different answers into the same exception. Nor are its credentials (see `gcs_credentials`). Here a request is tried
again only if that cannot do harm: what it asks for is idempotent or carries a precondition. Retries wait with full
jitter, count against a deadline and against a budget that all requests of the process share, so that a store that is
down is not hammered and every caller hears of it soon. Waiting for a token counts against the deadline only: it asks
another server. What hardly ever passes, a host name that does not exist or a certificate that nobody trusts, is tried a
few times in a part of the deadline. A resolver that is late, as in a pod that has just started, says "temporary
failure" and is waited for like any other.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import io
import itertools
import os
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

import aiohttp
from fsspec.asyn import get_loop
from gcsfs.core import GCSFileSystem

from orchestrator import environment
from orchestrator.errors import Unavailable
from orchestrator.observe.events import Retried, emit
from orchestrator.storage import gcs_identity
from orchestrator.storage.gcs_credentials import Credentials, NoToken, Token, is_absent
from orchestrator.storage.gcs_replies import REJECTED_FOR_SURE, Reply, line, may_pass, parse_error, retry_after_s
from orchestrator.storage.port import Patience, TooLarge

CONCURRENCY = 32  # requests in flight per process
_DEADLINE_S = 120.0  # for one operation with all its retries
_CONNECT_S = 10.0  # for one connection: a network that drops packets says nothing
_REQUEST_S = 30.0  # for one try, and a second more for each MiB that it carries
_FIRST_WAIT_S, _WAIT_MAX_S = 0.25, 16.0
_LAST_S = 1.0  # that a last try is left where the store asks for a longer wait than the deadline allows
_DOWN_SHARE = 8  # while the store answers nothing, an operation waits only this part of the deadline
_HOPELESS_SHARE = 8  # so does one that meets what hardly ever passes,
_HOPELESS_TRIES = 4  # in so many tries, evenly spread
_BUDGET = 200.0  # retries that may be spent before answers have to earn them
_PIECE_BYTES = 1 << 20
_EARNED = 1.0  # by each request that is answered
REPLY_BYTES_MAX = 64 << 20  # where the caller expects nothing larger: a page of a listing, an acknowledgement


class Budget:
    """Retries that the process may spend. Thread-safe."""

    def __init__(self, tokens: float = _BUDGET) -> None:
        self._most = self._tokens = tokens
        self._lock = threading.Lock()

    def earn(self) -> None:
        with self._lock:
            self._tokens = min(self._most, self._tokens + _EARNED)

    def spend(self) -> bool:
        """False if there is nothing left to spend."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


class _NoAnswer(Exception):
    """One try brought no usable answer. `kind` is what retries are counted by."""

    def __init__(self, kind: str, cause: str, *, landed: bool, wait_s: float = 0.0, hopeless: bool = False) -> None:
        super().__init__(cause)
        self.kind, self.landed, self.wait_s, self.hopeless = kind, landed, wait_s, hopeless


@dataclass
class _Operation:
    """One operation with all its tries. whom, before: who is being waited for, and what the last try brought."""

    operation: str
    name: str
    deadline_s: float
    whom: str
    before: str = ""
    started: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.started + self.deadline_s - time.monotonic()

    @property
    def notice(self) -> str:
        """For people who wait."""
        so_far = f" ({self.before})" if self.before else ""
        left = f"trying for {max(1.0, self.left_s):.0f} s more ({environment.STORE_DEADLINE})"
        return f"no answer from {self.whom} yet{so_far}: {self.operation} {self.name}; {left}"


class Client:
    """Sends requests from any thread; the work is done on fsspec's I/O thread.

    `requests` counts tries by operation, `retries` counts what was tried again by its reason.
    """

    def __init__(
        self,
        deadline_s: float = _DEADLINE_S,
        budget: Budget | None = None,
        first_wait_s: float = _FIRST_WAIT_S,
        patience: Patience | None = None,
    ) -> None:
        try:
            # Its own credentials are nobody's; only where the endpoint is, is asked of it.
            self._files = GCSFileSystem(token="anon", use_listings_cache=False, skip_instance_cache=True)
            self._loop = get_loop()
        except Exception as error:  # no descriptors, threads or memory left
            text = line(f"{type(error).__name__}: {error}")
            raise Unavailable(f"no client for Cloud Storage can be made: {text}", waited=True) from error
        self.credentials = Credentials(gcs_identity.find())
        self._more = {"userProject": payer} if (payer := environment.gcs_user_project()) else {}
        # Calls in a batch have URLs of their own.
        self.query = f"?{urlencode(self._more)}" if self._more else ""
        self.endpoint = str(self._files.base).removesuffix("/storage/v1/")
        self._patience = patience or Patience(deadline_s)
        self.deadline_s = self._patience.deadline_s
        self._host = urlsplit(self.endpoint).netloc
        self.requests: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self._budget, self._first_wait_s = budget or Budget(), first_wait_s
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._down = False  # an operation has waited for its whole deadline, and nothing has been answered since
        self._notified = False  # people know that nothing is answered
        atexit.register(self.close)

    def close(self) -> None:
        """End idle connections, else aiohttp complains when Python exits. Nothing depends on it."""
        if self._session is not None:
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(1)

    def token(self) -> Token:
        """Whom requests are made as, for those who make them without this client. Raises Unavailable."""
        try:
            return self.credentials.wait(self.deadline_s)
        except NoToken as error:
            raise Unavailable(f"the credentials for Cloud Storage cannot be used: {error}", waited=True) from error

    def send(
        self,
        operation: str,
        name: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        most_bytes: int = REPLY_BYTES_MAX,
    ) -> Reply:
        """The final answer to a request that may be repeated without harm. `name` is what errors call it.

        Raises Unavailable where there is none within the deadline or the retry budget, or one of more than `most_bytes`
        bytes.
        """
        # A save makes several requests in a row: each with the whole patience would outlast the save's own deadline.
        deadline_s = self.deadline_s / _DOWN_SHARE if self._down else self.deadline_s
        waiting = _Operation(operation, name, deadline_s, self._host)
        work = self._persist(waiting, method, path, params or {}, headers or {}, body, most_bytes)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            self._notify_late(waiting, future)
            return future.result(self.deadline_s + _REQUEST_S)
        except TimeoutError:
            future.cancel()
            raise Unavailable(f"{operation} {name}: no answer within {self.deadline_s:g} s", landed=True) from None

    def _notify_late(self, waiting: _Operation, future: Future[Reply]) -> None:
        """Wait a moment for the answer; if it does not come, tell people whom they wait for, once."""
        notify = self._patience.notify
        if notify and not self._notified and not concurrent.futures.wait([future], self._patience.notify_after_s).done:
            self._notified = True
            notify(waiting.notice)

    async def _persist(
        self,
        waiting: _Operation,
        method: str,
        path: str,
        params: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | None,
        most_bytes: int,
    ) -> Reply:
        operation, name, deadline_s = waiting.operation, waiting.name, waiting.deadline_s
        landed, before, accepted = False, None, True
        for tries in itertools.count(1):
            self.requests[operation] += 1
            left_s = waiting.left_s
            try:
                token = await self._token(waiting, landed)
                left_s = waiting.left_s
                signed = {**headers, **token.headers}
                reply = await self._once(method, path, params, signed, body, max(0.001, left_s), most_bytes)
                self._budget.earn()
                self._down = self._notified = False
                if reply.status == 401 and accepted and token.headers:  # perhaps the token was revoked early
                    accepted = False
                    self.credentials.reject(token)
                    self.retries["http 401"] += 1
                    emit(Retried("store", tries, operation, name, "http 401", 0.0))
                    continue
                return Reply(reply.status, reply.headers, reply.body, repeated=landed)
            except _TooLarge as error:
                raise TooLarge(name, error.bytes, most_bytes) from error
            except _NoAnswer as error:
                landed |= error.landed
                spent_s = deadline_s - waiting.left_s
                wait_s = self._wait_s(error, tries, waiting)
                late = spent_s + wait_s > deadline_s
                hopeless = error.hopeless and spent_s + wait_s > self.deadline_s / _HOPELESS_SHARE
                self._down = self._down or late or hopeless
                if late or hopeless or not self._budget.spend():
                    why = f"deadline of {deadline_s:g} s" if late else "the process's retry budget is spent"
                    why = "it hardly ever passes" if hopeless else why
                    # A last try that the deadline cut short says nothing of the store; the one before did.
                    cause = before if before and error.kind == "timeout" and left_s < _REQUEST_S else error
                    text = f"{operation} {name}: {cause}; gave up after {tries} tries in {spent_s:.1f} s ({why})"
                    raise Unavailable(text, landed=landed) from error
                self.retries[error.kind] += 1
                before, waiting.before = error, str(error)
                emit(Retried("store", tries, operation, name, error.kind, wait_s))
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

    def _wait_s(self, error: _NoAnswer, tries: int, waiting: _Operation) -> float:
        """How long until the next try."""
        wait_s = random.uniform(0, min(_WAIT_MAX_S, self._first_wait_s * 2 ** (tries - 1)))
        if error.hopeless:
            return max(wait_s, self.deadline_s / _HOPELESS_SHARE / _HOPELESS_TRIES)
        if error.wait_s:  # what the store asks for, but one last try before the deadline
            return max(wait_s, min(error.wait_s, waiting.left_s - _LAST_S))
        return wait_s

    async def _once(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | None,
        left_s: float,
        most_bytes: int,
    ) -> Reply:
        """One try. Raises _NoAnswer where another one could help."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=CONCURRENCY)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=True, middlewares=(_once_only,))
        limit_s = min(left_s, _REQUEST_S + len(body or b"") / (1 << 20))
        connect_s = min(_CONNECT_S, limit_s / 2)
        sent = functools.partial(self._session.request, params={**params, **self._more}, headers=headers)
        try:
            async with (
                self._slots,
                asyncio.timeout(limit_s),
                sent(
                    method,
                    self.endpoint + path,
                    data=_sent(body),
                    timeout=aiohttp.ClientTimeout(sock_connect=connect_s),
                ) as response,
            ):
                reply = Reply(response.status, dict(response.headers), await _body(response, most_bytes))
        except aiohttp.ConnectionTimeoutError as error:
            text = f"{self._host}: no connection within {connect_s:.1f} s"
            raise _NoAnswer("timeout", text, landed=False) from error
        except TimeoutError as error:
            raise _NoAnswer("timeout", f"no answer within {limit_s:.1f} s", landed=True) from error
        except (aiohttp.ClientError, OSError) as error:
            rejected = isinstance(error, aiohttp.ClientConnectorError)  # never connected: never carried out
            text, hopeless = _connection_failure(error)
            raise _NoAnswer("connection", text, landed=not rejected, hopeless=hopeless) from error
        if may_pass(reply):
            cause = parse_error(reply.body)
            reason = f" {cause.reason}" * (reply.status == 403)
            text = f"HTTP {reply.status} {cause.message}"
            landed = reply.status not in REJECTED_FOR_SURE
            wait_s = retry_after_s(reply.headers, time.time())
            raise _NoAnswer(f"http {reply.status}{reason}", text, landed=landed, wait_s=wait_s)
        return reply

    async def _token(self, waiting: _Operation, landed: bool) -> Token:
        """Whom the request is made as. Raises Unavailable."""
        waiting.whom = f"whoever gives tokens for Cloud Storage: {self.credentials.name}"
        try:
            token = await self.credentials.waited(max(0.001, waiting.left_s))
            waiting.whom = self._host
            return token
        except NoToken as error:
            self._down = self._down or error.passing  # it was waited for as long as the operation may take
            text = f"{waiting.operation} {waiting.name}: the credentials for Cloud Storage cannot be used: {error}"
            raise Unavailable(text, landed=landed, waited=True) from error


def _connection_failure(error: aiohttp.ClientError | OSError) -> tuple[str, bool]:
    """What kept a connection from being made, in one line; and whether that hardly ever passes."""
    if isinstance(error, _Interrupted):
        return line(str(error)), False
    if isinstance(error, aiohttp.ClientConnectorError):
        # aiohttp 3.12's error of a certificate has no `os_error`.
        cause = getattr(error, "certificate_error", None) or error.os_error
        if isinstance(cause, socket.gaierror):
            absent = is_absent(cause)
            text = "the name does not exist" if absent else "the name cannot be resolved yet"
            return line(f"{error.host}: {text} ({cause.strerror})"), absent
        if isinstance(cause, ssl.SSLCertVerificationError):
            return line(f"{error.host}:{error.port}: its certificate is not trusted: {cause.verify_message}"), True
    return line(f"{type(error).__name__}: {error}"), False


def _sent(body: bytes | None) -> io.BytesIO | bytes | None:
    """In pieces, if it is large: of one piece, asyncio moves what is left each time that it has sent some."""
    return io.BytesIO(body) if body and len(body) > _PIECE_BYTES else body


async def _body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The reply's body. Raises _TooLarge, before it is read where its length is announced."""
    if response.status not in (200, 206):  # what the service says about it
        most_bytes = REPLY_BYTES_MAX
    if (response.content_length or 0) > most_bytes:
        raise _TooLarge(response.content_length or 0)
    if response.content_length is not None and "Content-Encoding" not in response.headers:
        return await response.read()
    body = bytearray()  # of any length, or one that grows as it is unpacked
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > most_bytes:
            raise _TooLarge(len(body))
    return bytes(body)


class _TooLarge(Exception):
    """A reply of more bytes than anybody expects: so many, or so many at least."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bytes = size


class _Interrupted(aiohttp.ClientError):
    """The connection ended before the reply."""


async def _once_only(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keeps aiohttp from repeating GET and DELETE by itself when a connection ends: uncounted, and a delete whose
    reply was lost would look like a delete of nothing. It does so only for the errors caught here."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise _Interrupted(f"{type(error).__name__}: {error}") from error


_IDENTITY = (environment.EMULATOR, environment.ANONYMOUS, environment.USER_PROJECT, "GOOGLE_APPLICATION_CREDENTIALS")


@functools.lru_cache(maxsize=8)
def _client(identity: tuple[str | None, ...], patience: Patience) -> Client:
    return Client(patience=patience)


def client(patience: Patience | None = None) -> Client:
    """This process's client of that patience; None: a job's. Raises UsageError for environment variables of ours that
    make no sense."""
    environment.gcs_anonymous()
    return _client(tuple(map(os.environ.get, _IDENTITY)), patience or Patience(environment.store_deadline_s()))

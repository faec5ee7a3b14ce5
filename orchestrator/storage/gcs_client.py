"""Requests to Google Cloud Storage's JSON API: one client per process, bounded in every way.

gcsfs finds the credentials and the endpoint (application default, service account, workload identity; anonymous for an
emulator). Its file calls are not used: their retries know neither a deadline nor a budget, and turn different answers
into the same exception. Here a request is tried again only if that cannot do harm: what it asks for is idempotent or
carries a precondition. Retries wait with full jitter, count against a deadline and against a budget that all requests
of the process share, so that a store that is down is not hammered and every caller hears of it soon.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
from fsspec.asyn import get_loop
from gcsfs.core import GCSFileSystem
from google.auth.exceptions import TransportError

from orchestrator import environment
from orchestrator.errors import StorageError, Unavailable
from orchestrator.events import Retried, emit
from orchestrator.storage.base import TooLarge

CONCURRENCY = 32  # requests in flight per process
_DEADLINE_S = 120.0  # for one operation with all its retries
_REQUEST_S = 30.0  # for one try, and a second more for each MiB that it carries
_FIRST_WAIT_S, _WAIT_MAX_S = 0.25, 16.0
_DOWN_SHARE = 8  # while the store answers nothing, an operation waits only this part of the deadline
_BUDGET = 200.0  # retries that may be spent before answers have to earn them
_EARNED = 1.0  # by each request that is answered
REPLY_BYTES_MAX = 64 << 20  # where the caller expects nothing larger: a page of a listing, an acknowledgement
_TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_REFUSED_FOR_SURE = frozenset({408, 429})  # and certainly not carried out


@dataclass(frozen=True)
class Reply:
    """An answer that is final. `repeated`: an earlier try got none, and may have been carried out."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    repeated: bool = False


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

    def __init__(self, kind: str, cause: str, *, landed: bool, wait_s: float = 0.0) -> None:
        super().__init__(cause)
        self.kind, self.landed, self.wait_s = kind, landed, wait_s


class Client:
    """Sends requests from any thread; the work is done on fsspec's I/O thread.

    `requests` counts tries by operation, `retries` counts what was tried again by its reason.
    """

    def __init__(
        self, deadline_s: float = _DEADLINE_S, budget: Budget | None = None, first_wait_s: float = _FIRST_WAIT_S
    ) -> None:
        anonymous = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
        try:
            self._files = GCSFileSystem(
                access="read_write",
                token=anonymous,
                project=os.environ.get("GOOGLE_CLOUD_PROJECT", ""),
                use_listings_cache=False,
                skip_instance_cache=True,
            )
            self._loop = get_loop()
        except Exception as error:  # a key file may hold anything, and each library has errors of its own for it
            raise Unavailable(_no_credentials(error), waited=True) from error
        self.endpoint = str(self._files.base).removesuffix("/storage/v1/")
        self.deadline_s = deadline_s
        self.requests: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self._budget, self._first_wait_s = budget or Budget(), first_wait_s
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(CONCURRENCY)
        self._down = False  # an operation has waited for its whole deadline, and nothing has been answered since
        atexit.register(self.close)

    def close(self) -> None:
        """End idle connections, else aiohttp complains when Python exits. Nothing depends on it."""
        if self._session is not None:
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result(1)

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
        work = self._persist(operation, name, method, path, params or {}, headers or {}, body, most_bytes)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(self.deadline_s + _REQUEST_S)
        except TimeoutError:
            future.cancel()
            raise Unavailable(f"{operation} {name}: no answer within {self.deadline_s:g} s", landed=True) from None

    async def _persist(
        self,
        operation: str,
        name: str,
        method: str,
        path: str,
        params: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | None,
        most_bytes: int,
    ) -> Reply:
        started = time.monotonic()
        # A save makes several requests in a row: each with the whole patience would outlast the save's own deadline.
        deadline_s = self.deadline_s / _DOWN_SHARE if self._down else self.deadline_s
        landed, before = False, None
        for tries in itertools.count(1):
            self.requests[operation] += 1
            left_s = started + deadline_s - time.monotonic()
            try:
                reply = await self._once(method, path, params, headers, body, max(0.001, left_s), most_bytes)
                self._budget.earn()
                self._down = False
                return Reply(reply.status, reply.headers, reply.body, repeated=landed)
            except _TooLarge as error:
                raise TooLarge(name, error.bytes, most_bytes) from error
            except _NoAnswer as error:
                landed |= error.landed
                wait_s = max(error.wait_s, random.uniform(0, min(_WAIT_MAX_S, self._first_wait_s * 2 ** (tries - 1))))
                spent_s = time.monotonic() - started
                late = spent_s + wait_s > deadline_s
                self._down = self._down or late
                if late or not self._budget.spend():
                    why = f"deadline of {deadline_s:g} s" if late else "the process's retry budget is spent"
                    # A last try that the deadline cut short says nothing of the store; the one before did.
                    said = before if before and error.kind == "timeout" and left_s < _REQUEST_S else error
                    text = f"{operation} {name}: {said}; gave up after {tries} tries in {spent_s:.1f} s ({why})"
                    raise Unavailable(text, landed=landed) from error
                self.retries[error.kind] += 1
                before = error
                emit(Retried("store", tries, operation, name, error.kind, wait_s))
                await asyncio.sleep(wait_s)
        raise AssertionError("unreachable")

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
        signed = dict(headers)
        try:
            async with self._slots, asyncio.timeout(limit_s):
                await self._sign(signed)
                async with self._session.request(
                    method, self.endpoint + path, params=dict(params), headers=signed, data=body
                ) as response:
                    reply = Reply(response.status, dict(response.headers), await _body(response, most_bytes))
        except TimeoutError as error:
            raise _NoAnswer("timeout", f"no answer within {limit_s:.1f} s", landed=True) from error
        except (aiohttp.ClientError, OSError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError)  # never connected: never carried out
            text = str(error) if isinstance(error, _Interrupted) else f"{type(error).__name__}: {error}"
            raise _NoAnswer("connection", text, landed=not refused) from error
        if reply.status in _TRANSIENT:
            text = f"HTTP {reply.status} {_message(reply)}"
            landed = reply.status not in _REFUSED_FOR_SURE
            raise _NoAnswer(f"http {reply.status}", text, landed=landed, wait_s=_retry_after(reply))
        return reply

    async def _sign(self, headers: dict[str, str]) -> None:
        """Add the credential. Raises _NoAnswer where another try could help, Unavailable."""
        try:  # on a thread: renewing a token is a blocking request of its own
            await asyncio.to_thread(self._files.credentials.apply, headers)
        except (OSError, TransportError) as error:
            raise _NoAnswer("credentials", _no_credentials(error), landed=False) from error
        except Exception as error:  # google-auth's, gcsfs' and requests' own
            raise Unavailable(_no_credentials(error), waited=True) from error


def _no_credentials(error: Exception) -> str:
    said = error.__cause__ or error  # gcsfs says "Invalid Credentials" of whatever google-auth said
    text = f"{type(said).__name__}: {said}"[:1000]
    return f"the credentials for Cloud Storage cannot be used: {text}; see GOOGLE_APPLICATION_CREDENTIALS, docs/gcs.md"


async def _body(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    """The reply's body. Raises _TooLarge, before it is read where its length is announced."""
    if response.status != 200:  # what the service says about it
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


def _retry_after(reply: Reply) -> float:
    told = reply.headers.get("Retry-After", "")
    return min(float(told), _WAIT_MAX_S) if told.isdecimal() else 0.0


def _message(reply: Reply) -> str:
    """What the service says, in one short line."""
    text = reply.body[:2000].decode("utf-8", "replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:300]


def refusal(operation: str, name: str, reply: Reply) -> StorageError:
    """The error for a final answer that is not the one wanted."""
    hint = {
        401: "; the credentials are not accepted",
        403: "; the credential lacks a role on the bucket, see docs/gcs.md",
        404: "; check the bucket's name",
    }.get(reply.status, "")
    return StorageError(f"{operation} {name}: HTTP {reply.status} {_message(reply)}{hint}")


@functools.lru_cache(maxsize=8)
def _client(endpoint: str, deadline_s: float) -> Client:
    return Client(deadline_s)


def client() -> Client:
    """This process's client. Raises UsageError for a deadline that is no number."""
    return _client(os.environ.get("STORAGE_EMULATOR_HOST", ""), environment.store_deadline_s())

"""The life of this process's token for Cloud Storage: nobody else renews it. `gcs_identity` finds whose it is.

A token is used for as long as it is valid. It is renewed early, by a thread beside those who use it; whoever has none
waits for that thread no longer than the deadline of its own operation, and no lock is held meanwhile. What may pass (no
answer, 5xx, 429) is tried again as long as anybody waits; what will not (revoked, no such account) is raised at once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from absl import logging

from orchestrator.observe.events import CredentialsRejected, Retried, emit
from orchestrator.storage.gcs_replies import line

_EARLY_S = 300.0  # before its end a token is renewed; a metadata server has no newer one much earlier
_MARGIN_S = 10.0  # before its end it is not used any more: a request takes a while
_AGAIN_S = 30.0  # between early renewals
_FIRST_WAIT_S, _WAIT_MAX_S = 0.25, 4.0  # between tries while somebody waits
_ABSENT_SHARE = 8  # a server whose name does not exist is tried for this part of the time that somebody waits
_ABSENT = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


class NoToken(Exception):
    """There is no token. Its text is one line for people, without secrets. `passing`: trying again may help. `absent`:
    hardly, as the server's name does not exist."""

    def __init__(self, text: str, *, passing: bool, absent: bool = False) -> None:
        super().__init__(text)
        self.passing, self.absent = passing, absent


def is_absent(error: BaseException) -> bool:
    """Whether a resolver says that there is no such name. One that is late, or has no network, says EAI_AGAIN."""
    return isinstance(error, socket.gaierror) and error.errno in _ABSENT


@dataclass(frozen=True)
class Token:
    """Headers that a request needs, and until when (seconds since 1970)."""

    headers: Mapping[str, str]
    expires: float


@dataclass(frozen=True)
class Identity:
    """Whom requests are made as. `label`: for people; more may be known of it after a renewal. `advice`: what to do
    when it cannot be used. `renew`: a new token, from one bounded try; raises NoToken. `shared`: TensorStore, left to
    itself, finds the same one."""

    label: Callable[[], str]
    renew: Callable[[], Token]
    advice: str = ""
    shared: bool = False


ANONYMOUS = Identity(lambda: "nobody, as asked for", lambda: Token({}, float("inf")))


class Credentials:
    """Gives out the token of one identity. Any thread; nothing blocks but `wait`, which is bounded.

    find: the identity; called by the renewing thread until it succeeds. Raises NoToken. now: seconds since 1970.
    """

    def __init__(
        self,
        find: Callable[[], Identity],
        now: Callable[[], float] = time.time,
        first_wait_s: float = _FIRST_WAIT_S,
        again_s: float = _AGAIN_S,
    ) -> None:
        self._find, self._now, self._first_wait_s, self._again_s = find, now, first_wait_s, again_s
        self._lock = threading.Lock()  # held for moments, never while anything is asked
        self._identity: Identity | None = None
        self._token: Token | None = None
        self._renewal: Future[Token] | None = None
        self._until = 0.0  # somebody waits until then
        self._looked = float("-inf")
        self._failed = ""  # why the last try brought nothing
        self._failing = False

    @property
    def name(self) -> str:
        """Who it is, as far as it is known yet."""
        return self._identity.label() if self._identity else "credentials not found yet"

    @property
    def shared(self) -> bool:
        """Whether TensorStore, left to itself, uses the same identity. False before the first token."""
        return self._identity is not None and self._identity.shared

    def held(self) -> Token | None:
        """The token, if there is a valid one. One that is near its end is being renewed from now on."""
        with self._lock:
            return self._valid()

    def wait(self, left_s: float) -> Token:
        """A valid token, on a thread that may wait so long for it. Raises NoToken."""
        with self._lock:
            due = self._valid() or self._renewing(left_s)
        if isinstance(due, Token):
            return due
        try:
            return due.result(left_s)
        except TimeoutError:
            raise self._late(left_s) from None

    async def waited(self, left_s: float) -> Token:
        """As `wait`, in an event loop."""
        with self._lock:
            due = self._valid() or self._renewing(left_s)
        if isinstance(due, Token):
            return due
        waiting = asyncio.wrap_future(due)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to hear of it
        await asyncio.wait({waiting}, timeout=left_s)  # unlike wait_for, this leaves it to others who wait
        if not waiting.done():
            raise self._late(left_s)
        return waiting.result()

    def _valid(self) -> Token | None:
        """As `held`. The lock is held."""
        left_s = self._token.expires - self._now() if self._token else 0.0
        if left_s <= _MARGIN_S:
            return None
        if left_s < _EARLY_S and time.monotonic() - self._looked > self._again_s:
            self._renewing(0.0)
        return self._token

    def reject(self, token: Token) -> None:
        """The store does not accept it: the next that asks gets another one."""
        with self._lock:
            if self._token is token:
                self._token = None

    def _late(self, left_s: float) -> NoToken:
        before = f"; before: {self._failed}" if self._failed else ""
        return NoToken(f"{self.name}: no token within {left_s:.1f} s{before}{self._advice}", passing=True)

    @property
    def _advice(self) -> str:
        return f"; {self._identity.advice}" if self._identity and self._identity.advice else ""

    def _renewing(self, left_s: float) -> Future[Token]:
        """The renewal under way; one is begun if there is none. The lock is held."""
        until = time.monotonic() + left_s
        self._until = max(self._until, until) if self._renewal else until
        if self._renewal is None:
            self._renewal = future = Future[Token]()
            try:
                threading.Thread(target=self._renew, args=(future,), name="gcs-credentials", daemon=True).start()
            except RuntimeError as error:  # no thread can be started
                self._renewal = None
                future.set_exception(NoToken(f"{self.name}: {error}", passing=True))
        return self._renewal or future

    def _renew(self, future: Future[Token]) -> None:
        began = time.monotonic()
        for tries in itertools.count(1):
            try:
                token, failed = self._once(), None
            except NoToken as error:
                token, failed = None, error
            except BaseException as error:  # each library has errors of its own, and whoever waits must hear of it
                token, failed = None, NoToken(f"{type(error).__name__}: {line(str(error))}", passing=False)
            wait_s = random.uniform(0.5, 1.0) * min(_WAIT_MAX_S, self._first_wait_s * 2 ** min(tries - 1, 10))
            with self._lock:
                self._looked, self._failed = time.monotonic(), str(failed or "")
                share = _ABSENT_SHARE if failed and failed.absent else 1
                late = self._looked + wait_s > began + (self._until - began) / share
                if token or not failed.passing or late:  # type: ignore[union-attr]
                    self._token = token or self._token
                    self._renewal = None
                    break
            emit(Retried("store", tries, "credentials", self.name, str(failed)[:300], wait_s))
            time.sleep(wait_s)
        self._tell(failed)
        if token is not None:
            future.set_result(token)
            return
        assert failed is not None
        if not failed.passing:
            emit(CredentialsRejected(self.name, str(failed)[:300]))
        count = f"; tried {tries} times in {time.monotonic() - began:.1f} s" if tries > 1 else ""
        who = f"{self.name}: " if self._identity else ""
        future.set_exception(NoToken(f"{who}{failed}{count}{self._advice}", passing=failed.passing))

    def _once(self) -> Token:
        """One try. Raises NoToken."""
        if self._identity is None:
            self._identity = self._find()
        return self._identity.renew()

    def _tell(self, failed: NoToken | None) -> None:
        """Once for each time that renewing begins to fail while there is a token to go on with."""
        left_s = self._token.expires - self._now() if self._token else 0.0
        if failed and not self._failing and left_s > _MARGIN_S:
            text = "%s: the token cannot be renewed, and is used as long as it is valid, for %.0f s more: %s"
            logging.warning(text, self.name, left_s, failed)
        self._failing = failed is not None

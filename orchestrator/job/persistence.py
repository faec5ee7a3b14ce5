"""How long an upload goes on: it tries again what a store that does not answer has not done, ever more rarely, until it
has been told that something newer waits for it, or after a day. Any thread."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from orchestrator.errors import OutcomeUnknown, StorageError, Unavailable
from orchestrator.job.poll import REAL, Clock
from orchestrator.observe.events import Retried, emit

Value = TypeVar("Value")
PATIENCE_S = 24 * 3600.0  # for one upload, as long as nothing newer waits
_FIRST_WAIT_S, _WAIT_MAX_S = 0.5, 30.0
_POLL_S = 0.2


class GivenUp(StorageError):
    """An upload ends before the store has the step, as something newer waits, or as there is no more time."""


class Persistence:
    """Of one upload. enough_s: how long it may take once something newer waits for it. due: whether its turn has come;
    before, it makes way at once. going_on: called, often, for as long as it does."""

    def __init__(self, enough_s: float, clock: Clock = REAL, going_on: Callable[[], None] = lambda: None) -> None:
        self._enough_s, self._clock, self._going_on = enough_s, clock, going_on
        self._began_s: float | None = None
        self._newer = self._end = ""
        self._unanswered = ""  # what the store has failed to do last, as long as it has done nothing since

    def begin(self) -> None:
        """Its turn has come."""
        self._began_s = self._clock.now()

    def make_way(self, newer: str) -> None:
        """`newer` is due: a store that does not answer, or has had `enough_s`, is to be sent that instead."""
        self._newer = self._newer or newer

    def end(self, reason: str) -> None:
        """Give up now."""
        self._end = self._end or reason

    @property
    def over(self) -> str:
        """Why it is given up; '' if it goes on."""
        if self._end:
            return self._end
        if self._began_s is None:
            return f"{self._newer}, and the save before is still being uploaded" if self._newer else ""
        took_s = self._clock.now() - self._began_s
        if self._newer and self._unanswered:
            return f"{self._newer}, and the store does not answer: {self._unanswered}"
        if self._newer and took_s > self._enough_s:
            return f"{self._newer}, and this upload has taken {took_s:.0f} s"
        return f"this upload has taken {took_s:.0f} s" if took_s > PATIENCE_S else ""

    def check(self) -> None:
        """Raises GivenUp."""
        if reason := self.over:
            raise GivenUp(reason)
        self._going_on()

    def persist(self, what: str, call: Callable[[], Value]) -> Value:
        """What `call` returns: made again, with pauses, for as long as the store cannot be reached. It must do no harm
        when it is made twice. Raises what it raises otherwise, and GivenUp."""
        tries = 0
        while True:
            self.check()
            try:
                result = call()
            except (Unavailable, OutcomeUnknown) as error:
                tries += 1
                self._unanswered = str(error)
                wait_s = min(_WAIT_MAX_S, _FIRST_WAIT_S * 2 ** min(tries - 1, 16)) * random.uniform(0.5, 1.0)
                logging.log_every_n_seconds(
                    logging.WARNING, "the upload of %s goes on when the store answers again: %s", 30, what, error
                )
                emit(Retried("store", tries, "upload", what, "no answer", wait_s))
                self.pause(wait_s)
            else:
                self._unanswered = ""
                return result

    def pause(self, wait_s: float) -> None:
        """Raises GivenUp as soon as this upload is given up."""
        until = self._clock.now() + wait_s
        while (left_s := until - self._clock.now()) > 0:
            self.check()
            self._clock.sleep(min(left_s, _POLL_S))

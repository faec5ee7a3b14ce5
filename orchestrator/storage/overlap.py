"""Requests that are under way at the same time: a store far away takes as long for several as for one.

Each runs on a daemon thread of its own: a store may hang for ever, and then the interpreter must be able to end. How
long one takes is bounded by the store's own deadline, and how many there are by whoever begins them: a handful.
Nothing here decides anything: what is begun early is what would have been done a moment later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Begun(Generic[Value]):
    """A call that has been begun, or a value that is known already. began_s: when, on the monotonic clock."""

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self._future: Future[Value] = Future()

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def ended(self) -> bool:
        """Whether the call has ended, well or not."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> Value:
        """What the call returns, when it does. Raises what it raises, TimeoutError after `timeout_s`."""
        return self._future.result(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Return when the call has ended, well or not, or after `timeout_s`."""
        wait([self._future], timeout_s)

    def _run(self, call: Callable[[], Value]) -> None:
        try:
            self._future.set_result(call())
        except BaseException as error:  # for whoever asks
            self._future.set_exception(error)


def begin(call: Callable[[], Value]) -> Begun[Value]:
    """Begin `call` beside this thread; where no further thread can be had, it is done before this returns."""
    begun = Begun[Value](time.monotonic())
    try:
        threading.Thread(target=begun._run, args=(call,), name="overlap", daemon=True).start()
    except RuntimeError:  # can't start new thread
        begun._run(call)
    return begun


def known(value: Value, began_s: float) -> Begun[Value]:
    """As if a call that was begun at `began_s` had returned `value`."""
    begun = Begun[Value](began_s)
    begun._run(lambda: value)
    return begun


def together(*calls: Callable[[], Value]) -> list[Value]:
    """What the calls return, in their order; the first is done on this thread, the others beside it. Raises what the
    first of them, in their order, has raised."""
    others = [begin(call) for call in calls[1:]]
    return [*(call() for call in calls[:1]), *(other.result() for other in others)]

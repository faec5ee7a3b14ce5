"""The end of the program, and of agents that nobody has closed.

A program that ends without `close` still has its last save in flight. It is finished first, within the bound of any
save, while Python's threads and JAX still run. What is lost all the same is said on standard error, and the program
does not end with 0: with 1, or with the error's own code (5: fenced). A program that ends with an uncaught exception
keeps its code. Nobody else is met: the other processes may be elsewhere.

An agent that is dropped without `close` ends its threads when Python collects it, with a ResourceWarning. A forked
child has neither the threads nor the saves: there nothing of this happens.
"""

from __future__ import annotations

import atexit

# Whoever is registered last runs first: its hook, after which no pool takes work any more, must be there before ours.
import concurrent.futures.thread  # noqa: F401
import contextlib
import itertools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from absl import logging

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.texts import printable

CLOSED = "is closed; open another one"
INTERRUPTED = 130  # as a shell has it for SIGINT

# Private: CPython has no public hook that comes before `concurrent.futures` stops to take work, which a save in flight
# needs; without it `atexit` is the next best. tests/arrays/test_private_apis.py watches it.
_before_threads_end = getattr(threading, "_register_atexit", atexit.register)
# The releases of CPython in which no thread starts from the end of the main module on, not even before that hook: what
# a save in flight has yet to start, fails. It is lost, and said to be; nothing that Python runs comes earlier.
_NO_THREADS_AT_THE_END = ((3, 12, 0), (3, 12, 1))
_numbers = itertools.count()
_open: weakref.WeakValueDictionary[int, Unfinished] = weakref.WeakValueDictionary()
_hooked = False


class Unfinished(Protocol):
    """An open agent."""

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved."""

    def finish(self) -> OrchestratorError | None:
        """Wait for the save in flight, within its bound, and close without a barrier. Returns why it is lost."""


class Lifetime:
    """Of an agent, from being opened to being closed: who may use it, and what ends with it. Any thread.

    `ends`: what gives back what the agent has taken and ends its threads, without holding the agent.
    """

    def __init__(self, agent: Unfinished, url: str, *ends: Callable[[], None]) -> None:
        global _hooked
        if not _hooked:
            _hooked = True
            os.register_at_fork(after_in_child=_open.clear)
            with contextlib.suppress(RuntimeError):  # an agent that is opened while the program ends
                _before_threads_end(_end)
        self._url, self._closed, self._using = url, "", threading.RLock()
        self._pid, self._number = os.getpid(), next(_numbers)
        _open[self._number] = agent
        self._drop = weakref.finalize(agent, _dropped, self._pid, url, ends)
        self._drop.atexit = False

    @contextlib.contextmanager
    def used_by_one(self, what: str) -> Iterator[None]:
        """One thread at a time: two saves at once would take each other's place, and hosts must call in one order.
        Raises UsageError, also once the agent is closed, and in a forked child, where it is the parent's."""
        if self._closed:
            raise UsageError(f"{what}: the agent of {self._url} {self._closed}")
        if self._forked:
            raise UsageError(f"{what}: the agent of {self._url} was opened before the fork; open another one here")
        if not self._using.acquire(blocking=False):
            raise UsageError(f"{what}: another thread is using the agent of {self._url}; wait until it is done")
        try:
            yield
        finally:
            self._using.release()

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._pid

    @property
    def closed(self) -> bool:
        return bool(self._closed)

    def close(self, state: str = CLOSED) -> bool:
        """From now on nobody may use the agent, and is told its `state`. False if it was closed before, or is not this
        process's to close."""
        if self._closed or self._forked:
            return False
        self._closed = state
        return True

    def let_finish(self, timeout_s: float) -> None:
        """Wait until no other thread is in a call of it."""
        if self._using.acquire(timeout=timeout_s):
            self._using.release()

    def over(self, in_flight: int | None) -> None:
        """The agent is closed: its threads have ended. `in_flight`: what was not waited for, as it took too long, or
        Ctrl-C came. Not reached if another Ctrl-C came: the next `close` ends the rest, or Python, when it collects it.
        Idempotent."""
        if in_flight is not None:
            logging.warning("step %d: not waited for; it is lost unless it is saved before the process ends", in_flight)
        _open.pop(self._number, None)
        self._drop.detach()


def finish() -> int:
    """Finish what open agents have in flight, each within its bound. Says on standard error what is lost. Returns the
    exit code for that, 0 if nothing is. For the end of the program; main thread."""
    code = 0
    for agent in list(_open.values()):
        step = agent.in_flight
        if step is not None:
            logging.warning("the program ends without close(): step %d is still being saved, and is waited for", step)
        try:
            lost = agent.finish()
            if lost:
                code = max(code, lost.exit_code)
                _tell(f"lost: {lost}")
        except KeyboardInterrupt:
            _tell(f"lost: step {step}: interrupted while it was being saved")
            code = INTERRUPTED
        except Exception as error:  # whatever it is, it must not stay unheard, nor keep the others from finishing
            _tell(f"lost: step {step}: {type(error).__name__}: {error}")
            code = max(code, 1)
    _open.clear()
    return code


def _tell(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it
        print(f"orchestrator: {printable(text, details=True)}", file=sys.stderr, flush=True)


class _ExitCode:
    """Ends the process with `code` when Python takes its modules apart, the last thing that it does: exit handlers have
    run, among them JAX's, and output is flushed. An exit handler has no say in the code (none that is public)."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __del__(self, end: Callable[[int], None] = os._exit) -> None:
        end(self.code)


_exit_code: _ExitCode | None = None


def _end() -> None:
    global _exit_code
    code = finish()
    if code and sys.version_info[:3] in _NO_THREADS_AT_THE_END:
        _tell("this Python starts no thread once the program ends; close the agent, or take Python 3.12.2 or later")
    # An uncaught exception has a code already. Interactive, `last_value` is any exception that was shown.
    if code and (getattr(sys, "last_value", None) is None or hasattr(sys, "ps1")):
        _exit_code = _ExitCode(code)


def _dropped(pid: int, url: str, ends: Sequence[Callable[[], None]]) -> None:
    if os.getpid() != pid:
        return
    warnings.warn(f"the agent of {url} was dropped without close()", ResourceWarning, stacklevel=2)

    def run() -> None:
        for end in ends:
            end()

    # This may run in the middle of anything, in any thread, under any lock: so what takes locks and waits, not here.
    with contextlib.suppress(RuntimeError):  # no more threads: the program ends
        threading.Thread(target=run, name="dropped", daemon=True).start()

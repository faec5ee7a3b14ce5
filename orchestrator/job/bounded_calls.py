"""Calls that may hang, made on another thread and waited for within a bound, even while the interpreter ends.

Python 3.12 starts no thread once it is ending, and 3.12.0 and 3.12.1 none from the end of the main module on: whoever
calls from an exit handler needs a thread that was there before. So a few are kept, which `prepare` starts and whose
call does not end them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

SPARE = 3  # idle threads kept: at exit, one call may hang while the next are made

_lock = threading.Lock()
_idle: list[queue.SimpleQueue[Callable[[], None]]] = []


def prepare() -> None:
    """From now on SPARE calls can hang, and `within` still works, whatever the interpreter is doing."""
    with _lock:
        missing = SPARE - len(_idle)
    for _ in range(missing):
        _give_back(_start())


def within(bound_s: float, call: Callable[[], Any]) -> Any:
    """What `call` returns; None if it raises, takes longer than `bound_s`, when it goes on by itself, or if there is
    no thread to make it on. Any thread."""
    result: list[Any] = []
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(BaseException):
            result.append(call())
        done.set()

    with _lock:
        worker = _idle.pop() if _idle else None
    if worker is None:
        try:
            worker = _start()
        except RuntimeError:  # the interpreter is ending
            return None
    worker.put(run)
    done.wait(bound_s)
    return result[0] if result else None


def _start() -> queue.SimpleQueue[Callable[[], None]]:
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            calls.get()()
            if not _give_back(calls):
                return

    threading.Thread(target=work, name="bounded-call", daemon=True).start()
    return calls


def _give_back(worker: queue.SimpleQueue[Callable[[], None]]) -> bool:
    """False where enough are idle."""
    with _lock:
        if len(_idle) >= SPARE:
            return False
        _idle.append(worker)
        return True


def _forget() -> None:
    """In a forked child, which has none of the threads, and may have got the lock while another thread held it."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


os.register_at_fork(after_in_child=_forget)

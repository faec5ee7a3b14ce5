"""Calls that may hang: bounded, one does not hold up the next, and they work in exit handlers of every Python."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from orchestrator.job import bounded_calls

AT_EXIT = """
import atexit, threading
from orchestrator.job import bounded_calls

def no_thread():
    raise RuntimeError("can't create new thread at interpreter shutdown")

def leave():
    threading.Thread.start = lambda self: no_thread()  # what Python 3.12 does by itself
    hung = bounded_calls.within(0.05, threading.Event().wait)
    print(hung, *(bounded_calls.within(5.0, lambda: number) for number in (1, 2)), flush=True)
    for _ in range(bounded_calls.SPARE):
        bounded_calls.within(0.05, threading.Event().wait)
    print(bounded_calls.within(5.0, lambda: 3), flush=True)

bounded_calls.prepare()
atexit.register(leave)
"""


def test_a_call_that_hangs_is_left_at_its_bound_and_holds_up_no_other() -> None:
    go_on = threading.Event()
    started = time.monotonic()
    assert bounded_calls.within(0.05, go_on.wait) is None
    assert [bounded_calls.within(30.0, lambda number=number: number) for number in range(10)] == list(range(10))
    assert time.monotonic() - started < 30.0
    go_on.set()


def test_a_call_that_raises_gives_nothing() -> None:
    assert bounded_calls.within(30.0, lambda: 1 / 0) is None
    assert bounded_calls.within(30.0, lambda: 7) == 7


def test_calls_are_made_while_the_interpreter_starts_no_thread_any_more() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("None 1 2\nNone\n", "", 0)


BOARD = """
import threading, types
from orchestrator.job import bounded_calls, rendezvous

board = rendezvous.ServiceBoard(0, 2)
posted = []
board._client = types.SimpleNamespace(key_value_set=lambda key, value, allow_overwrite: posted.append(key))
go_on, start = threading.Event(), threading.Thread.start
for _ in range(bounded_calls.SPARE):
    bounded_calls.within(0.05, go_on.wait)

def no_thread(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")

threading.Thread.start = no_thread
board.post("without a thread", "")
threading.Thread.start = start
go_on.set()
board.post("with one", "")
print(posted)
"""


def test_a_board_that_had_no_thread_for_a_call_makes_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", BOARD], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("['with one']\n", "", 0)

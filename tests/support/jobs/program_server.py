"""Starts small programs quickly: each is forked from here, where everything has been imported and nothing started, and
its end is a real end of Python, with every exit handler.

Reads one JSON object a line, writes one for each.
    {"start": NAME, "arguments": [...], "output": PATH, "environ": {...}}   -> {"pid": PID}
    {"wait": PID, "timeout_s": S}                                           -> {"code": CODE, null if it still runs}
A code is as subprocess has it: -N for signal N. What still runs when the input ends is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any


def forked(job: dict[str, Any]) -> int:
    """The child's number; 0 in the child, whose output goes where it should."""
    pid = os.fork()
    if pid == 0:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(source, descriptor)
        os.environ.update(job["environ"])
        # As at a terminal: whoever runs the tests in the background ignores some of them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return pid


def code_of(pid: int, timeout_s: float) -> int | None:
    end = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.01)


def serve() -> dict[str, Any] | None:
    """Returns the job in the child that is to do it, None in the server when it is no longer needed."""
    running: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            pid = forked(order)
            if pid == 0:
                return order
            running.add(pid)
            answer: dict[str, Any] = {"pid": pid}
        else:
            answer = {"code": code_of(order["wait"], order["timeout_s"])}
            if answer["code"] is not None:
                running.discard(order["wait"])
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


if __name__ == "__main__":  # a spawned worker of a program imports this file, too, and needs nothing of it
    from tests.support.jobs import ending_programs

    job = serve()
    if job:
        ending_programs.PROGRAMS[job["start"]](*job["arguments"])

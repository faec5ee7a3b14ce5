"""Whole files to xdist's workers, and a run that ends whatever becomes of a worker; a plugin of pytest.

xdist 3.8 gives what a dead worker had begun to another one with nothing in it that is left to do, and a worker that is
asked for nothing, or for a single test, waits for ever (its issues 1323 and 1327; open in what is released). It also
plays the test that killed the worker again, and asks a worker that still collects (1189, 1362).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

import pytest

try:
    from xdist.scheduler import LoadFileScheduling
except ImportError:  # pytest runs without it as well, in one process
    LoadFileScheduling = object

LIMIT_NAME = "TESTS_LIMIT_S"
LIMIT_S = 4500.0  # a run takes ten to twenty minutes; three times as much on a slow machine
_DYING_S = 3.0  # for the tracebacks

# By what they took in a whole run. Begun last, one of them alone would be what everybody waits for.
LONGEST = (
    "pages/test_docs.py",
    "proof/test_unreadable.py",
    "proof/test_fuzz.py",
    "launch/test_demo.py",
    "launch/test_train.py",
    "job/test_promotion_jobs.py",
    "launch/test_manifests.py",
    "job/test_multiprocess.py",
    "proof/test_crash_explorer.py",
    "job/test_tier_jobs.py",
    "launch/test_contract.py",
    "storage/test_root.py",
    "compat/test_compat.py",
    "proof/test_chaos.py",
    "pages/test_examples.py",
    "job/test_leaving.py",
    "job/test_leaves.py",
    "job/test_attest.py",
    "arrays/reading/test_exchange.py",
    "pages/test_guides.py",
    "tools/test_export.py",
    "test_public_names.py",
)


class FileScheduling(LoadFileScheduling):  # type: ignore[misc]
    """What a dead worker had left goes to the next one, but for the test that it died in, which has failed."""

    def remove_node(self, node: Any) -> str | None:
        left = [
            (file, [test for test, done in tests.items() if not done])
            for file, tests in self.assigned_work.pop(node).items()
        ]
        left = [(file, tests) for file, tests in left if tests]
        if not left:
            return None
        died_in = left[0][1].pop(0)
        for file, tests in reversed(left):
            if tests:
                self.workqueue[file] = dict.fromkeys(tests, False)
                self.workqueue.move_to_end(file, last=False)
        for other in self.nodes:
            self._reschedule(other)
        return str(died_in)

    def _reschedule(self, node: Any) -> None:
        """More for this worker until it has something to go on with, or is told that there is no more."""
        if node not in self.registered_collections:
            return  # it still collects
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) <= 2:
            super()._reschedule(node)

    def running(self) -> dict[str, tuple[int, str]]:
        """By worker: its process, and the test that it is in."""
        found = {}
        for node, files in list(self.assigned_work.items()):
            tests = [test for tests in list(files.values()) for test, done in list(tests.items()) if not done]
            found[node.gateway.id] = node.gateway._rinfo().pid, (tests or ["no test"])[0]
        return found


class Limit(threading.Thread):
    """Ends the whole run, with a word on what each worker was in, when it takes too long."""

    def __init__(self, limit_s: float, scheduling: FileScheduling, terminal: Any) -> None:
        super().__init__(name="limit of the tests", daemon=True)
        self._limit_s = limit_s
        self._scheduling = scheduling
        self._terminal = terminal
        self.over = threading.Event()

    def run(self) -> None:
        if self.over.wait(self._limit_s):
            return
        try:
            self._end()
        finally:
            os._exit(1)

    def _end(self) -> None:
        workers = self._scheduling.running()
        told = [f"The tests have not ended in {self._limit_s:.0f} s ({LIMIT_NAME}) and are ended here. Running:"]
        told += [f"  {worker} (process {pid}): {test}" for worker, (pid, test) in workers.items()]
        self._terminal.ensure_newline()
        for line in told:
            self._terminal.write_line(line, flush=True)
        for number in (signal.SIGABRT, signal.SIGKILL):  # pytest prints the stacks of all threads at the first
            for pid, _ in workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(_DYING_S)


_limit: Limit | None = None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    """xdist asks once, in the process that hands out the work."""
    global _limit
    if config.getvalue("dist") != "loadfile":
        return None
    scheduling = FileScheduling(config, log)
    _limit = Limit(
        float(os.environ.get(LIMIT_NAME, LIMIT_S)), scheduling, config.pluginmanager.get_plugin("terminalreporter")
    )
    _limit.start()
    return scheduling


def pytest_unconfigure() -> None:
    if _limit is not None:
        _limit.over.set()

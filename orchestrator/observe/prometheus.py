"""Prometheus metrics of one process, out of its events: an endpoint (loopback unless asked), a text file, or both.

Names, labels and units are a contract with dashboards and alerts: docs/reference/metrics.md lists them and a test
compares the two. Nothing here may hurt the job: a port or a file that cannot be had is one warning.
"""

from __future__ import annotations

import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from absl import logging
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
    write_to_textfile,
)

from orchestrator.observe import events
from orchestrator.observe.events import Event
from orchestrator.rules.records import Cause

TEXTFILE_INTERVAL_S = 10.0
_INTERVALS = 5  # between commits, for their median
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """`on_event` may be called from any thread. `registry` is this agent's own: two agents do not mix."""

    def __init__(
        self, process: int, host: str, clock: Callable[[], float] = time.monotonic, directory: str | None = None
    ) -> None:
        """directory: of a run on a disk, whose free space is exported."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
        self._clock = clock
        self._committed = clock()
        self._any = False
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)
        self._saves: dict[tuple[int, str], _InProgress] = {}
        self._lock = threading.Lock()
        self.registry = registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"orchestrator_{name}", about, labels, registry=registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"orchestrator_{name}", about, labels, registry=registry)

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"orchestrator_{name}", about, buckets=_SECONDS, registry=registry)

        Gauge("orchestrator_process", "1; who this is", ("process", "host"), registry=registry).labels(
            str(process), host
        ).set(1)
        self._epoch = gauge("epoch", "The run's epoch: goes up at each start of the job")
        self._started = counter("saves_started", "Saves that this process took part in")
        self._commits = counter("saves_committed", "Saves that were committed")
        self._failures = counter("saves_not_committed", "Saves that ended without a commit", "cause")
        self._blocked = histogram("save_blocked_seconds", "Time that training waited for a save")
        self._durable = histogram("save_durable_seconds", "From the call of save to its commit")
        self._bytes = counter("written_bytes", "Array bytes that this process wrote")
        self._retries = counter("retries", "Operations that were tried again", "what")
        self._rejected = counter("credentials_rejected", "Requests that failed because of who this process is")
        self._fenced = counter("fenced", "Saves rejected because a newer epoch has taken over")
        self._down = counter("stepped_down", "Damaged steps that a restore stepped over")
        self._held = counter("steps_held", "Steps that are held in memory")
        self._not_held = counter("steps_not_held", "Steps that were due to be held in memory, and are not")
        self._copied = counter("held_copies_bytes", "Bytes of held steps sent to other hosts, all copies together")
        self._held_step = gauge("last_held_step", "The step held in memory last, -1 before the first")
        self._held_step.set(-1)
        self._restore = histogram("restore_seconds", "Whole restores")
        self._read = counter("read_bytes", "Array bytes that restores read")
        self._deleted = counter("deleted_bytes", "Bytes of steps that nobody needs, deleted")
        self._undeleted = counter("delete_failures", "Files that could not be deleted")
        self._step = gauge("last_committed_step", "The step committed last, -1 before the first")
        self._step.set(-1)
        self._begin()
        self._state = gauge("step_bytes", "All files of the step committed last, on process 0; 0 elsewhere")
        self._quarantined = gauge("quarantined_steps", "Quarantined attempts at the last commit; NaN if not known")
        self._quarantined.set(math.nan)
        self._phases = gauge("save_phase_seconds", "Time in each phase of the last save", "phase")
        self._idle = gauge(
            "main_thread_idle_seconds", "Since the main thread last reported anything, at the last pulse"
        )
        self._step_s = gauge("step_seconds", "Median time of training's last steps, 0 if not known")
        self._ended = gauge("run_ended", "1 once the agent was closed in order, 0 before")
        self._watch_clock(gauge, directory)

    def _watch_clock(self, gauge: Callable[..., Gauge], directory: str | None) -> None:
        """Gauges that are computed when somebody asks."""
        updated = gauge("updated_timestamp_seconds", "When these values were collected, in seconds since 1970")
        updated.set_function(time.time)
        free = gauge("free_bytes", "Free space where the run is; NaN in a bucket, or where it cannot be asked")
        free.set_function(lambda: _free_bytes(directory))
        since = gauge("seconds_since_commit", "Since the last commit; before the first, since the agent was opened")
        since.set_function(lambda: self._clock() - self._committed)
        interval = gauge("commit_interval_seconds", "Median of the last intervals between commits, 0 before two")
        interval.set_function(lambda: statistics.median(self._intervals or [0.0]))

    def _begin(self) -> None:
        """Counters of each kind that alerts ask about begin at 0: the first of a kind would be no increase."""
        for cause in Cause:
            self._failures.labels(cause)
        self._retries.labels("credentials")

    def on_event(self, event: Event) -> None:
        with self._lock:
            self._count(event)

    def _count(self, event: Event) -> None:
        match event:
            case events.EpochOpened():
                self._epoch.set(event.epoch)
            case events.SavePhase(phase="staging"):
                self._started.inc()
                self._saves[event.step, event.attempt] = _InProgress("staging")
            case events.SavePhase():
                save = self._saves.setdefault((event.step, event.attempt), _InProgress(event.phase, event.elapsed_s))
                self._enter(save, event.phase, event.elapsed_s)
                self._bytes.inc(max(0, event.written_bytes - save.written_bytes))
                save.written_bytes = max(save.written_bytes, event.written_bytes)
            case events.SaveStarted():
                self._blocked.observe(event.blocked_s)
            case events.SaveCommitted():
                self._commit(event)
            case events.Pulse():
                self._idle.set(event.idle_s)
                self._step_s.set(event.step_s if event.steps > 1 else 0.0)  # the first one compiles
            case events.Closed():
                self._ended.set(1)
            case events.SaveNotCommitted():
                self._saves.pop((event.step, event.attempt), None)
                self._failures.labels(event.cause).inc()
                self._fenced.inc(event.cause == "fenced")
            case events.StepHeld():
                self._held.inc()
                self._copied.inc(event.sent_bytes)
                self._held_step.set(event.step)
            case events.StepNotHeld():
                self._not_held.inc()
            case events.StepRestored():
                self._restore.observe(event.elapsed_s)
                self._read.inc(event.read_bytes)
            case events.SteppedDown():
                self._down.inc()
            case events.Retried(operation="credentials"):
                self._retries.labels("credentials").inc()  # the reason is free text: no label
            case events.CredentialsRejected():
                self._rejected.inc()
            case events.Retried():
                self._retries.labels(f"{event.what} {event.reason}".strip()).inc()
            case events.AttemptsDeleted():
                self._deleted.inc(event.deleted_bytes)
                self._undeleted.inc(event.failed)

    def _enter(self, save: _InProgress, phase: str, at_s: float) -> None:
        """A phase of the save begins, or goes on."""
        if save.phase != phase:
            self._phases.labels(save.phase).set(max(0.0, at_s - save.since_s))
            save.phase, save.since_s = phase, at_s

    def _commit(self, event: events.SaveCommitted) -> None:
        now = self._clock()
        if self._any:  # the first one's interval is the start of the job
            self._intervals.append(now - self._committed)
        self._any = True
        self._committed = now
        self._commits.inc()
        self._durable.observe(event.elapsed_s)
        self._step.set(event.step)
        self._state.set(event.state_bytes)
        if event.quarantined >= 0:
            self._quarantined.set(event.quarantined)
        if save := self._saves.pop((event.step, event.attempt), None):
            self._enter(save, "", event.elapsed_s)


@dataclass
class _InProgress:
    """A save in its phase, and since when, in seconds since it began."""

    phase: str
    since_s: float = 0.0
    written_bytes: int = 0


def _free_bytes(directory: str | None) -> float:
    try:
        found = os.statvfs(directory or "")
    except OSError:
        return math.nan
    return float(found.f_bavail * found.f_frsize)


def serve(metrics: Metrics, port: int, address: str) -> Callable[[], None]:
    """Answer `http://ADDRESS:PORT/metrics` until the returned function is called. Port 0: any free one, in the log."""
    try:
        server, thread = start_http_server(port, address, metrics.registry)
    except OSError as error:
        logging.warning("metrics: %s:%d cannot be listened on: %s", address, port, error)
        return lambda: None
    logging.info("metrics: http://%s:%d/metrics", address, server.server_port)

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(1.0)

    return close


def keep_textfile(metrics: Metrics, path: str) -> Callable[[], None]:
    """Write `path` (whole or not at all) every few seconds, and once more when the returned function is called."""
    ended = threading.Event()
    failed = False

    def write() -> None:
        nonlocal failed
        try:
            write_to_textfile(path, metrics.registry)
        except OSError as error:
            if not failed:
                logging.warning("metrics: %s cannot be written: %s", path, error)
            failed = True

    def run() -> None:
        write()
        while not ended.wait(TEXTFILE_INTERVAL_S):
            write()
        write()

    thread = threading.Thread(target=run, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        ended.set()
        thread.join(2.0)

    return close

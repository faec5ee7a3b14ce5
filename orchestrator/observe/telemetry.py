"""What an agent reports about itself: pulse, event log, metrics, traces. One object, opened and closed by the agent.

None of it may hurt the job: what cannot be opened is one warning. The agent's thread never waits for a disk or a port.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from orchestrator.errors import UsageError
from orchestrator.observe import events, heartbeat, progress_lines
from orchestrator.observe.event_log import EventLog, directory_of
from orchestrator.options import Options

_EARLY_MAX = 1000  # events that are kept until the epoch is open


class Telemetry:
    """Receives every event of this process until `close`. The event log, which may be below the run's root, is written
    once the incarnation's epoch is `opened`, earlier events included: until then the job may still be rejected."""

    def __init__(self, options: Options, url: str, *, process: int, host: str) -> None:
        self._closers: list[Callable[[], None]] = []
        self._directory, self._process, self._host = directory_of(url, options.events_dir), process, host
        self._early: deque[tuple[float, events.Event]] = deque(maxlen=_EARLY_MAX)
        self._stop_early = events.subscribe(lambda event: self._early.append((time.time(), event)))
        self._closers.append(self._stop_early)
        if progress_lines.wanted(options.progress, process):
            lines = progress_lines.ProgressLines(progress_lines.say, bars=progress_lines.person_sits())
            self._subscribe(lines.on_event, lines.close)
        if options.metrics_port is not None or options.metrics_file:
            from orchestrator.observe import prometheus

            on_disk = url.removeprefix("file://")
            metrics = prometheus.Metrics(process, host, directory=None if "://" in on_disk else on_disk)
            self._subscribe(metrics.on_event, lambda: None)
            if options.metrics_port is not None:
                self._closers.append(prometheus.serve(metrics, options.metrics_port, options.metrics_address))
            if options.metrics_file:
                self._closers.append(prometheus.keep_textfile(metrics, options.metrics_file))
        if options.traces:
            try:
                from orchestrator.observe.spans import Traces
            except ImportError as error:
                raise UsageError("Options(traces=True) needs opentelemetry-api: install the `traces` extra") from error
            self._subscribe(Traces(process, host).on_event, lambda: None)
        self._closers.insert(0, heartbeat.Heart().close)

    def opened(self, epoch: int) -> None:
        """The incarnation's epoch is open: write the event log from here on. Main thread, once."""
        self._closers.remove(self._stop_early)
        self._stop_early()
        if self._directory is not None:
            log = EventLog(self._directory, process=self._process, host=self._host, epoch=epoch)
            for at, event in self._early:
                log.write(event, at)
            self._subscribe(log.write, log.close)
        self._early.clear()

    def _subscribe(self, reader: Callable[[events.Event], None], close: Callable[[], None]) -> None:
        self._closers += [events.subscribe(reader), close]

    def close(self) -> None:
        """End it, bounded by a few seconds. Idempotent."""
        while self._closers:
            self._closers.pop(0)()

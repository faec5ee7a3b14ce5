"""OpenTelemetry spans out of this process's events: `save` with one child for each phase, and `restore`.

Spans go to the tracer provider that the program has configured; without one they go nowhere. They are made when the
save or restore has ended, with the times at which things happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode, Tracer, set_span_in_context

from orchestrator.observe import events
from orchestrator.observe.events import PHASES, Event

_NS = 1_000_000_000


class Traces:
    """`on_event` may be called from any thread."""

    def __init__(
        self, process: int, host: str, tracer: Tracer | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._about: dict[str, str | int] = {"orchestrator.process": process, "host.name": host}
        self._tracer = tracer or trace.get_tracer("orchestrator")
        self._clock = clock
        self._saves: dict[tuple[int, str], tuple[float, dict[str, float]]] = {}  # when it began, and its phases

    def on_event(self, event: Event) -> None:
        match event:
            case events.SavePhase():
                save = event.step, event.attempt
                if event.phase == PHASES[0]:
                    self._saves[save] = self._clock() - event.elapsed_s, {}
                if found := self._saves.get(save):
                    began, phases = found
                    phases.setdefault(event.phase, began + event.elapsed_s)
            case events.SaveCommitted():
                self._save(event.step, event.attempt, "")
            case events.SaveNotCommitted():
                self._save(event.step, event.attempt, event.reason)
            case events.StepRestored():
                end = self._clock()
                span = self._start("restore", end - event.elapsed_s, event.step, event.attempt)
                span.set_attribute("orchestrator.read_bytes", event.read_bytes)
                span.end(int(end * _NS))

    def _save(self, step: int, attempt: str, reason: str) -> None:
        found = self._saves.pop((step, attempt), None)
        if found is None:
            return  # rejected before it began
        end, (began, phases) = self._clock(), found
        span = self._start("save", began, step, attempt)
        within = set_span_in_context(span)
        begun = list(phases.items())
        for (phase, start), (_, stop) in zip(begun, [*begun[1:], ("", end)], strict=True):
            child = self._tracer.start_span(phase, context=within, start_time=int(start * _NS))
            child.end(int(stop * _NS))
        if reason:
            span.set_status(StatusCode.ERROR, reason)
        span.end(int(end * _NS))

    def _start(self, name: str, start: float, step: int, attempt: str) -> Span:
        about = {**self._about, "orchestrator.step": step, "orchestrator.attempt": attempt}
        return self._tracer.start_span(f"orchestrator.{name}", start_time=int(start * _NS), attributes=about)

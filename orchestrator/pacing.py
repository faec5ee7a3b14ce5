"""What process 0 measures for `oc.auto`: how long saves block and take to be durable, and how often the job fails."""

from __future__ import annotations

import time
from collections import deque

from absl import logging

from orchestrator import cadence
from orchestrator.cadence import Cadence, Costs
from orchestrator.catalog import Catalog
from orchestrator.errors import OrchestratorError
from orchestrator.events import CadenceChosen, emit
from orchestrator.policy import Adaptive

_SAVES = 5  # whose median counts: the first one of a process warms up
_CHANGE = 0.1  # a new interval is told of if it differs by so much


class Pacing:
    """Main thread of process 0. `informed` gives a policy what has been measured so far."""

    def __init__(self, catalog: Catalog) -> None:
        self._started = time.monotonic()
        self._history = _history(catalog)
        self._blocked_s: deque[float] = deque(maxlen=_SAVES)
        self._durable_s: deque[float] = deque(maxlen=_SAVES)
        self.chosen: Cadence | None = None

    def saved(self, blocked_s: float, durable_s: float) -> None:
        """A save let training go on after `blocked_s`, on the slowest host, and was committed after `durable_s`."""
        self._blocked_s.append(blocked_s)
        self._durable_s.append(durable_s)

    @property
    def costs(self) -> Costs | None:
        """None before the first commit."""
        if not self._durable_s:
            return None
        running_s = time.monotonic() - self._started
        return cadence.costs(self._history, self._blocked_s, self._durable_s, running_s)

    def informed(self, policy: Adaptive) -> Adaptive:
        costs = self.costs
        if costs is None:
            return policy
        told = policy.informed(costs)
        chosen = told.cadence
        before = self.chosen.interval_s if self.chosen else 0.0
        if chosen and abs(chosen.interval_s - before) > _CHANGE * before:
            self.chosen = chosen
            emit(CadenceChosen(chosen.interval_s, chosen.goodput, chosen.because))
        return told


def _history(catalog: Catalog) -> cadence.History:
    try:
        return cadence.history(cadence.borders(catalog.require_head(), catalog.entry))
    except OrchestratorError as error:  # a cadence is no reason not to train
        logging.warning("the run's history cannot be read, taken to be new: %s", error)
        return cadence.History()

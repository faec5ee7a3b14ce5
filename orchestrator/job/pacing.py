"""What process 0 measures for `oc.auto`: how long saves block and take to be durable, and how often the job fails."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from absl import logging
from msgspec.structs import replace

from orchestrator.errors import Damaged, OrchestratorError
from orchestrator.observe.events import CadenceChosen, emit
from orchestrator.policy import Adaptive
from orchestrator.rules import save_interval
from orchestrator.rules.records import Head
from orchestrator.rules.save_interval import Cadence, Costs
from orchestrator.run.journal_store import JournalStore

_SAVES = 5  # whose median counts: the first one of a process warms up
_CHANGE = 0.1  # a new interval is reported if it differs by so much


class Pacing:
    """Main thread of process 0. `informed` gives a policy what has been measured so far."""

    def __init__(self, store: JournalStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started_s = clock, clock()
        self._history = _history(store)
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
        running_s = self._clock() - self._started_s
        return save_interval.costs(self._history, self._blocked_s, self._durable_s, running_s)

    def informed(self, policy: Adaptive) -> Adaptive:
        costs = self.costs
        if costs is None:
            return policy
        policy = policy.informed(costs)
        chosen = policy.cadence
        before = self.chosen.interval_s if self.chosen else 0.0
        if chosen and abs(chosen.interval_s - before) > _CHANGE * before:
            self.chosen = chosen
            emit(CadenceChosen(chosen.interval_s, chosen.goodput, chosen.because))
        return policy


def _history(store: JournalStore) -> save_interval.History:
    def entry(version: int) -> Head:
        try:
            return store.entry(version)
        except Damaged:  # missing, below a `recovered` entry: of no epoch
            return replace(head, version=version, epoch=0, live=(), retired=(), aside=())

    try:
        head = store.require_head()
        return save_interval.history(save_interval.borders(head, entry))
    except OrchestratorError as error:  # a cadence is no reason not to train
        logging.warning("the run's history cannot be read, taken to be new: %s", error)
        return save_interval.History()

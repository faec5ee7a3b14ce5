"""What process 0 measures for `oc.auto`: how long saves block and take to be durable, and how often the job fails."""

from __future__ import annotations

import time
from collections import deque

from absl import logging
from msgspec.structs import replace

from orchestrator.errors import Damaged, OrchestratorError
from orchestrator.observe.events import CadenceChosen, emit
from orchestrator.policy import Adaptive
from orchestrator.rules import save_interval
from orchestrator.rules.records import Head
from orchestrator.rules.save_interval import Cadence, Costs
from orchestrator.run.journal_store import Catalog

_LOOK_STEPS_MAX = 64  # between two questions to process 0, however far the next save is
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
        return save_interval.costs(self._history, self._blocked_s, self._durable_s, running_s)

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


class Looks:
    """When all processes next ask process 0 whether a timed policy is due: a question is a collective, which may cost
    more than many saves do. Process 0 says at each look at which step the next one is: half-way, in time, to when a
    save can be due, by how long steps have taken, and at most twice as far as the one before, from one step on after
    each save: steps that are suddenly slower must not make the save late. Main thread, all processes."""

    def __init__(self) -> None:
        self.next = 0  # the same on all processes
        self._looked: tuple[int, float] | None = None
        self._stride = 1

    def plan(self, step: int, quiet_s: float) -> int:
        """On process 0, at a look at `step`: the step of the next look. `quiet_s`: nothing is due by time before."""
        now, before = time.monotonic(), self._looked
        if before is None or step > before[0]:
            self._looked = (step, now)
        if quiet_s <= 0:
            self._stride = 1
            return step
        if before is None or step <= before[0]:
            return step + 1
        step_s = max((now - before[1]) / (step - before[0]), 1e-6)
        stride = max(1, min(self._stride, _LOOK_STEPS_MAX, int(quiet_s / 2 / step_s)))
        self._stride = 2 * stride
        return step + stride


def _history(catalog: Catalog) -> save_interval.History:
    def entry(version: int) -> Head:
        try:
            return catalog.entry(version)
        except Damaged:  # missing, below a `recovered` entry: of no epoch
            return replace(head, version=version, epoch=0, live=(), retired=(), aside=())

    try:
        head = catalog.require_head()
        return save_interval.history(save_interval.borders(head, entry))
    except OrchestratorError as error:  # a cadence is no reason not to train
        logging.warning("the run's history cannot be read, taken to be new: %s", error)
        return save_interval.History()

"""What process 0 warns of once in an incarnation, however many saves it concerns."""

from __future__ import annotations

from absl import logging

from orchestrator import policy
from orchestrator.observe.events import HostLocalDiffers, emit
from orchestrator.policy import KeepPolicy
from orchestrator.rules import holders
from orchestrator.rules.attempt import Attempt
from orchestrator.texts import printable

_LEAVES_MAX = 10_000  # remembered


class Notices:
    """Any thread, one at a time."""

    def __init__(self) -> None:
        self._leaves = set[str]()
        self._metric_missing = False

    def missing_metric(self, step: int, keep: KeepPolicy | None, metrics: dict[str, float]) -> None:
        """That retention goes by a metric which a save does not have, such as a misspelt one."""
        if not self._metric_missing and (lack := policy.lacking(keep, metrics)):
            self._metric_missing = True
            logging.warning("step %d: %s", step, printable(lack))

    def host_local(self, state: Attempt) -> None:
        """That processes have other values of their own than the one that is stored, once for each leaf."""
        found = [one for one in holders.differences(state.intent, state.receipts) if one.leaf.name not in self._leaves]
        if found and len(self._leaves) < _LEAVES_MAX:
            self._leaves |= {one.leaf.name for one in found}
            text = "; ".join(holders.lines(found, state.receipts))
            emit(HostLocalDiffers(state.intent.step, state.intent.attempt, len(found), text))

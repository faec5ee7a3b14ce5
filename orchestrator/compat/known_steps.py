"""The steps that Orbax's policies are told of, the same on all processes: they decide alike whether a step is due."""

from __future__ import annotations

import time
from collections.abc import Mapping

from orchestrator.agent import Agent
from orchestrator.compat import orbax_options
from orchestrator.compat.orbax_options import StepInfo
from orchestrator.compat.stored_steps import PlainInfo, StoredSteps
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import Round, agree

# What process 0 says to all: its restorable steps; the step whose save has failed, and the one that is being saved.
_STEPS: Round[list[PlainInfo]] = Round("steps of the run", list[PlainInfo])
_SAVING: Round[tuple[int | None, int | None]] = Round("has it failed?", tuple[int | None, int | None])


class KnownSteps:
    """infos: in the order of their saves. `all_metrics`: policies may look at the metrics of all of them.

    `reload` and `is_new` may be collectives: main thread, all processes.
    """

    def __init__(self, stored: StoredSteps, rendezvous: Rendezvous, timeout_s: float, *, all_metrics: bool) -> None:
        self._stored, self._rendezvous, self._timeout_s = stored, rendezvous, timeout_s
        self._all_metrics = all_metrics
        self.infos: list[StepInfo] = []
        self._unsure: int | None = None  # the step begun last, the newest of them: its save may still fail

    def reload(self) -> None:
        """Read the run's steps again; all processes then know the same (process 0's)."""

        def infos() -> list[PlainInfo]:
            return self._stored.infos(self._stored.restorable(), all_metrics=self._all_metrics)

        agreed = agree(self._rendezvous, _STEPS, self._timeout_s, infos)
        self.infos = [orbax_options.info(*each) for each in agreed]

    def __contains__(self, step: int) -> bool:
        return any(info.step == step for info in self.infos)

    def is_new(self, step: int, agent: Agent | None) -> bool:
        """Whether `step` comes after all of them. All processes must answer the same: whether the save begun last has
        failed, process 0 says for all."""
        if agent and self._unsure is not None and self._unsure >= step:
            failed, in_flight = agree(
                self._rendezvous, _SAVING, self._timeout_s, lambda: (agent.failed_step, agent.in_flight)
            )
            self.forget(failed)
            if in_flight is None:
                self._unsure = None
        return not self.infos or self.infos[-1].step < step

    def begin(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """A save of `step` has begun, and may still fail."""
        if step not in self:
            self.infos.append(orbax_options.info(step, time.time(), dict(metrics) if metrics else None))
            self._unsure = step

    def forget(self, step: int | None) -> None:
        """A step whose save has failed, or which was deleted, is as one that was never saved."""
        if step is not None:
            self.infos = [info for info in self.infos if info.step != step]
            self._unsure = None if self._unsure == step else self._unsure

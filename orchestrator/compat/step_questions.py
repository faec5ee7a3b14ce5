"""What a CheckpointManager answers about the steps of its run, by what this manager knows of them."""

from __future__ import annotations

from typing import Any

from orchestrator.compat import orbax_options
from orchestrator.compat.known_steps import KnownSteps
from orchestrator.compat.managed_run import ManagedRun
from orchestrator.compat.stored_steps import NoSuchStep
from orchestrator.rules.records import LiveStep


class StepQuestions:
    """Part of `manager.CheckpointManager`. `orbax`: its CheckpointManagerOptions."""

    def __init__(self, run: ManagedRun, known: KnownSteps, orbax: Any) -> None:
        self._run, self._known, self._orbax = run, known, orbax

    @property
    def directory(self) -> Any:
        """The root. On a file system it has a directory for each step, as Orbax's has; in a store, where it has none, a
        path of it that leads to one raises UsageError."""
        return self._run.directory

    def all_steps(self, read: bool = False) -> list[int]:
        """Steps that can be restored, and the one that is being saved. As in Orbax, of what other programs have saved
        since this manager was made, only `reload` tells, or `read=True`; what is gone is never among them."""
        if read:
            self.reload()
        steps = {live.step for live in self._restorable()}
        in_flight = self._in_flight
        return sorted(steps if in_flight is None else {*steps, in_flight})

    def _restorable(self) -> list[LiveStep]:
        return [live for live in self._run.stored.restorable() if live.step in self._known]

    def latest_step(self) -> int | None:
        """The step committed last, or the one that is being saved; None in a new run. Raises NothingToRestore where
        all steps are quarantined: a loop that asks this would take None for a new run."""
        in_flight = self._in_flight
        if in_flight is not None:
            return in_flight
        steps = [live.step for live in self._restorable()]
        if not steps:
            self._run.stored.check_any()
        return steps[-1] if steps else None

    def best_step(self) -> int | None:
        if self._orbax.best_fn is None:
            return self.latest_step()
        infos = [orbax_options.info(*each) for each in self._run.stored.infos(self._restorable(), all_metrics=True)]
        return orbax_options.best(infos, self._orbax.best_fn, self._orbax.best_mode)

    def reload(self) -> None:
        """Look for steps that other programs have saved; all processes then know the same (process 0's)."""
        self._known.reload()

    def is_saving_in_progress(self) -> bool:
        return self._in_flight is not None

    def metrics(self, step: int) -> dict[str, Any] | None:
        try:
            return self._run.stored.metrics_tree(self._run.stored.find(step)) or None
        except NoSuchStep:  # as in Orbax
            return None

    def item_metadata(self, step: int) -> Any:
        """Abstract arrays in the structure of what was saved (`.tree`); a Composite of them for several items."""
        return self._run.stored.items(self._run.stored.find(step)).skeletons()

    def metadata(self, step: int | None = None) -> Any:
        """Orbax's StepMetadata of a step, or its RootMetadata."""
        return self._run.root_metadata() if step is None else self._run.stored.metadata(step)

    @property
    def _in_flight(self) -> int | None:
        return self._run.writer.in_flight if self._run.writer else None

"""The steps of a run as both halves of the v1 API need them: objects by name are saved as one step, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.arrays.format import orbax_api, orbax_v1
from orchestrator.compat import custom_items, nested_metrics, orbax_items
from orchestrator.compat.manager import CheckpointManager
from orchestrator.compat.orbax_options import StepInfo
from orchestrator.compat.restore_items import restore_items
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.v1 import items
from orchestrator.rules.records import Json, LiveStep


@dataclass(frozen=True)
class About:
    """What is known of a step: `metadata` by item."""

    metadata: dict[str, Any]
    time_ns: int
    custom_metadata: dict[str, Json]


class Steps(CheckpointManager):
    """A CheckpointManager whose items are objects of the v1 API. Main thread, as that."""

    def __contains__(self, step: int) -> bool:
        return step in self.all_steps()

    def save_items(
        self,
        step: int,
        args: Any,
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: Mapping[str, Any] | None = None,
        custom_metadata: Mapping[str, Json] | None = None,
        on_commit: Callable[[], None] | None = None,
    ) -> bool:
        """As `save`. `overwrite`: a step that is there is replaced, by the journal entry that commits the new one; it
        stays if the save fails. `on_commit`: called on the save's thread."""
        if overwrite and step in self:
            self.wait_until_finished()
            self._known.forget(step)
            if self._run.writer:
                self._run.writer.forget(step)
        if on_commit is not None:
            self._run.on_commit[step] = on_commit
        saved = False
        try:
            saved = self.save(step, args=args, metrics=metrics, force=force, custom_metadata=custom_metadata)
        finally:
            if not saved:
                self._run.on_commit.pop(step, None)
        if overwrite and not saved:
            self.reload()
        return saved

    def has_failed(self, step: int) -> bool:
        """Whether the save of `step`, the newest that has ended, was lost."""
        agent = self._run.writer
        return agent is not None and agent.failed_step == step

    def is_saving(self, step: int) -> bool:
        return self._in_flight == step

    def live(self) -> list[LiveStep]:
        return self._restorable()

    def begun(self) -> list[StepInfo]:
        """The step that is being saved, if one is."""
        return [info for info in self._known.infos if info.step == self._in_flight]

    def metrics_tree(self, step: int) -> dict[str, Any] | None:
        return self._run.stored.metrics_tree(self.find(step)) or None

    def find(self, step: int | None) -> LiveStep:
        return self._run.stored.find(step)

    def metrics_of(self, live: LiveStep) -> dict[str, Any] | None:
        return nested_metrics.joined(self._run.stored.metrics(live)) or None

    def stored(self, step: int | None) -> StoredItems:
        """What a step holds; None: the newest whose records can be read."""
        self.wait_until_finished()
        return self._run.stored.newest_readable() if step is None else self._run.stored.items(self.find(step))

    def load_items(self, step: int | None, stored: StoredItems, given: Mapping[str, Any], about: Any) -> dict[str, Any]:
        """Objects by name, each into its abstract twin. Raises as `restore_items`, NoSuchItem."""
        run = self._run
        return restore_items(
            run.store,
            run.rendezvous,
            step,
            items.to_load(stored, given, about),
            stored,
            handlers=self._items,
            record=not self._orbax.read_only,
            timeout_s=run.timeout_s,
        )

    def describe(self, stored: StoredItems, about: Any) -> About:
        """Raises NoSuchStep, Damaged, StorageError."""
        live = self.find(stored.step)
        named = stored.described()
        for name in named:
            if stored.is_custom(name):
                named[name] = self._described_by_handler(stored, name, about)
        return About(named, int(live.time * 1e9), stored.extra.get("custom_metadata") or {})

    def _described_by_handler(self, stored: StoredItems, name: str, about: Any) -> Any:
        saved_by = (stored.extra.get("items") or {}).get(name)
        try:
            handler = items.Handled(orbax_v1.handler_for_load(about, name, None, saved_by), about)
        except KeyError:  # none is registered here
            return None
        files = orbax_items.custom_files(name, stored.process_states, self._run.rendezvous.process)
        return custom_items.with_files(name, files, handler.metadata)

    def path(self, step: int) -> Any:
        """Of the directory that a file system has for a step."""
        return orbax_api.path(self._run.url) / orbax_api.step_names(self._orbax).build_name(step)

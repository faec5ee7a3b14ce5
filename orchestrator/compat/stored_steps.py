"""The steps of a run as a loop written for Orbax asks for them: which there are, their metrics, metadata and items.

Reads only. Storage is asked each time; only the metrics that the journal leaves out are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from orchestrator.arrays.format import orbax_api
from orchestrator.compat import nested_metrics, stored_items
from orchestrator.compat.adopt import EXTRA
from orchestrator.compat.stored_items import StoredItems
from orchestrator.errors import Damaged, StepNotFound
from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Json, LiveStep
from orchestrator.run.journal_store import JournalStore


class NoSuchStep(StepNotFound, FileNotFoundError):
    """There is no such step, or none at all. Orbax raises FileNotFoundError."""


class NoSuchItem(NoSuchStep, KeyError):
    """The step has no such item. Orbax raises KeyError."""


class NoSuchNamedStep(NoSuchStep, ValueError):
    """As NoSuchStep, of a manager that was given a `step_name_format`. Orbax raises ValueError there."""


PlainInfo = tuple[int, float, dict[str, float]]  # step, time of the commit, metrics


class StoredSteps:
    """Of the run that `store` reads. Any thread. missing: what is raised for a step that is not there."""

    def __init__(self, store: JournalStore, missing: type[NoSuchStep] = NoSuchStep) -> None:
        self._store, self.missing = store, missing
        self._omitted_metrics: dict[AttemptId, dict[str, float]] = {}

    def restorable(self) -> list[LiveStep]:
        """In the order of their commits; [] in a new run."""
        head = self._store.head()
        return [live for live in head.live if live.restorable] if head else []

    def check_any(self) -> None:
        """Raises NothingToRestore where all steps are quarantined: a loop that hears of none would take the run for a
        new one."""
        head = self._store.head()
        if head:
            self._store.newest(head)

    def find(self, step: int | None) -> LiveStep:
        """`step`, or the newest one. Raises NoSuchStep, and NothingToRestore as `check_any`."""
        head = self._store.head()
        live = None
        if head:
            live = self._store.newest(head) if step is None else journal.find(head, step)
        if live is None or not live.restorable:
            name = "no step" if step is None else f"no step {step}"
            steps = ", ".join(str(each.step) for each in self.restorable()) or "none"
            raise self.missing(f"{self._store.url}: {name} to restore; choose from: {steps}")
        return live

    def infos(self, steps: Iterable[LiveStep], *, all_metrics: bool) -> list[PlainInfo]:
        """`all_metrics`: not only those that the journal carries, which need no reading."""
        return [(live.step, live.time, self.metrics(live) if all_metrics else live.metrics) for live in steps]

    def metrics(self, live: LiveStep) -> dict[str, float]:
        """All of a step's metrics."""
        if not live.metrics_omitted:
            return live.metrics
        if live.id not in self._omitted_metrics:
            self._omitted_metrics[live.id] = self._store.step(live).extra.metrics
        return self._omitted_metrics[live.id]

    def items(self, live: LiveStep) -> StoredItems:
        """What the step holds. Raises Damaged, StorageError."""
        step = self._store.step(live)
        extra = step.extra.extra.get(EXTRA)
        single = extra is None or bool(extra["single"])
        spec = step.intent.tree
        lists: set[tuple[str, ...]] = set()
        for name in stored_items.metadata_files([entry.path for entry in step.manifest.files]):
            body = step.file(name)
            lists |= stored_items.lists_in(body, name) if body else set()
        shardings: dict[str, Any] = {}
        for name in stored_items.sharding_files([entry.path for entry in step.manifest.files]):
            body = step.file(name)
            shardings |= stored_items.shardings_in(body, name) if body else {}
        states = {} if extra is None else step.process_states()  # of a native agent's, bytes that are nobody's items
        return StoredItems(live.step, spec.leaves, frozenset(lists), single, extra or {}, states, shardings)

    def newest_readable(self) -> StoredItems:
        """Of the newest step whose records can be read: a restore deals with the damaged ones above it."""
        newest = self.find(None)
        for live in reversed(self._store.require_head().live):
            with contextlib.suppress(Damaged):  # what merely cannot be read raises: an older step would be no answer
                if live.restorable:
                    return self.items(live)
        return self.items(newest)

    def metrics_tree(self, live: LiveStep) -> dict[str, Any]:
        """A step's metrics as they were given; {} without any."""
        stored = self._store.step(live).extra.extra.get(EXTRA)
        given = stored.get("metrics") if isinstance(stored, dict) else None
        return given if isinstance(given, dict) else nested_metrics.joined(self.metrics(live))

    def step_metadata(self, live: LiveStep, items: StoredItems) -> dict[str, Any]:
        """What Orbax's StepMetadata holds, of a step of ours, but what it says of items and metrics."""
        commit_ns = int(live.time * 1e9)
        handlers = items.extra.get("items") or dict.fromkeys(items.names, "")
        return {
            "item_handlers": handlers,
            "performance_metrics": {},
            "init_timestamp_nsecs": commit_ns,
            "commit_timestamp_nsecs": commit_ns,
            "custom_metadata": items.extra.get("custom_metadata", {}),
        }

    def metadata(self, step: int) -> Any:
        """As Orbax's StepMetadata. Raises NoSuchStep, Damaged, StorageError."""
        live = self.find(step)
        items = self.items(live)
        about = self.step_metadata(live, items)
        del about["performance_metrics"]
        made = orbax_api.public("metadata").StepMetadata
        return made(item_metadata=items.skeletons(), metrics=self.metrics_tree(live), **about)

    def older_root_metadata(self) -> dict[str, Json]:
        """What 0.2.0 and older of this package carried from step to step in their extra JSON; {} without any."""
        head = self._store.head()
        for live in reversed(head.live if head else ()):
            with contextlib.suppress(Damaged):
                extra = self._store.step(live).extra.extra.get(EXTRA)
                return extra.get("root_metadata") or {} if isinstance(extra, dict) else {}
        return {}

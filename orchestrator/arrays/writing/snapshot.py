"""A copy, on the devices themselves, of what this process writes of a state: training waits for it, and for nothing
else.

A copy within an H100 takes 3 ms for 4 GiB, the way to the host 85 ms, for which a step that donates the state would
wait (docs/benchmarks.md). Main thread.

A snapshot is taken only where there is room for it. XLA tells the most that was ever in use, but not by whom: what our
own snapshots can have added is taken off. Should a step need more than any before, it is not lost: XLA waits for memory
for ten seconds before it gives up, and a snapshot is gone sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import jax
from absl import logging

from orchestrator.arrays.writing.copy_programs import Layout, layout_of
from orchestrator.arrays.writing.warm_up import WarmUp
from orchestrator.arrays.writing.write_plan import Plan, shards_off_host


class Room:
    """How much of each device's memory training has needed so far. margin: the share of it that stays free."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self._needed: dict[Any, int] = {}  # at most, by others
        self._own: dict[Any, int] = {}  # at most, by snapshots

    def fits(self, sizes: Mapping[Any, int]) -> bool:
        """Whether `sizes`, bytes by device, can be had beside what training needs. Nothing is alive of ours."""
        return all([self._fits(device, size) for device, size in sizes.items()])

    def _fits(self, device: Any, size: int) -> bool:
        try:
            stats = device.memory_stats() or {}
        except (ValueError, jax.errors.JaxRuntimeError):  # a device that is another machine's, behind a proxy
            stats = {}
        limit, in_use = stats.get("bytes_limit", 0), stats.get("bytes_in_use", 0)
        peak = stats.get("peak_bytes_in_use", limit) - self._own.get(device, 0)
        self._needed[device] = max(self._needed.get(device, 0), peak, in_use)
        return bool(self._needed[device] + size <= limit * (1 - self._margin))

    def taken(self, sizes: Mapping[Any, int]) -> None:
        for device, size in sizes.items():
            self._own[device] = max(self._own.get(device, 0), size)


@dataclass
class Snapshot:
    """A state's shards on their devices, out of the reach of a step that donates the state. arrays: by a number of
    their own, for whoever copies them to take and delete; groups: the shards that are in each. uncopied: shards that
    are not in it."""

    layout: Layout
    arrays: dict[int, Any] = field(default_factory=dict)
    groups: dict[int, tuple[int, ...]] = field(default_factory=dict)
    uncopied: list[int] = field(default_factory=list)

    @property
    def uncopied_bytes(self) -> int:
        """Of those whose chunks go to files."""
        shards = (self.layout.shards[number] for number in self.uncopied)
        return sum(shard.nbytes for shard in shards if not shard.small)


class Snapshots:
    """Takes snapshots for one writer. stage: as in Options."""

    def __init__(self, stage: str, margin: float, warm_up: WarmUp) -> None:
        self._stage, self._warm_up = stage, warm_up
        self._layouts = WeakKeyDictionary[Plan, Layout]()
        self._room = Room(margin)

    def take(self, plan: Plan, shards: Sequence[Any]) -> Snapshot | None:
        """Copy `shards`, arrays of one device each: those of `plan.off_host` that this process writes. None where there
        is no room for it. `uncopied` of what is returned: shards that are not in it, as they need not be or as their
        program is not compiled yet."""
        if self._stage == "host" or not shards:
            return None
        layout = self._layouts.get(plan)
        if layout is None:
            layout = self._layouts[plan] = layout_of(shards_off_host(plan, shards))
        sizes = layout.sizes
        if self._stage == "auto" and not self._room.fits(sizes):
            return None
        try:
            snapshot = self._copied(layout, shards)
        except jax.errors.JaxRuntimeError as error:
            logging.warning("no snapshot on the devices, staging through the host: %s", error)
            return None
        self._room.taken(sizes)
        return snapshot

    def _copied(self, layout: Layout, shards: Sequence[Any]) -> Snapshot:
        snapshot, programs = Snapshot(layout), self._warm_up.programs
        snapshot.uncopied = [number for number, shard in enumerate(layout.shards) if shard.direct]
        for call in layout.calls:
            ready = not call.packs or programs.has(call)  # that of a copy is quickly compiled
            program = programs.compiled(call) if ready else None
            if not ready:
                self._warm_up.begin(layout)
            made: list[Any] | None = None
            try:
                if program is not None:
                    made = program([[shards[number] for number in group] for group in call.groups])
            except (TypeError, ValueError) as error:  # the user's arrays have a layout of their own
                logging.warning("no snapshot of %d arrays: %s", len(call.groups), error)
                programs.forget(call)
            if made is None:
                snapshot.uncopied += [number for group in call.groups for number in group]
                continue
            for group, array in zip(call.groups, made, strict=True):
                number = len(snapshot.arrays)
                snapshot.arrays[number], snapshot.groups[number] = array, group
        return snapshot

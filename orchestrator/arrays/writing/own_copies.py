"""Digests of the leaves of which every process has its own copy. Only process 0's copy is stored; the coordinator
compares the others with it, by these digests.

This process writes none of them. Host arrays are read when they are taken, as the caller may overwrite them. Arrays on
CPU devices are held, and read in the background. Accelerators copy theirs to the host first. The first save of a form
(tree, shapes, dtypes, shardings) compares everything, each later one at most EACH_SAVE_BYTES, in turn: if every host
had a whole copy of the state, comparing all of it would hold up training, although nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import crc32c
import jax
import numpy as np

from orchestrator.arrays.element_types import numpy_dtype
from orchestrator.arrays.format.compressed import deflated
from orchestrator.arrays.tree import Flat
from orchestrator.arrays.writing.write_plan import Plan, as_stored, joinable
from orchestrator.rules import holders
from orchestrator.rules.boxes import slices_in, whole_box
from orchestrator.rules.holders import Cut
from orchestrator.rules.records import Held

EACH_SAVE_BYTES = 64 << 20
_SMALL_BYTES = 64 << 10


class Turns:
    """Which own copies the next save compares, for each form of state that one writer has."""

    def __init__(self) -> None:
        self._next = WeakKeyDictionary[Plan, int]()  # where the next save's comparison starts; absent: compare all

    def chosen(self, plan: Plan) -> tuple[tuple[int, Held], ...]:
        """The leaves of `plan.own` to compare in this save."""
        own, start = plan.own, self._next.get(plan)
        if start is None or sum(plan.own_bytes) <= EACH_SAVE_BYTES:
            return own
        count = total = 0
        while count < len(own) and (total := total + plan.own_bytes[(start + count) % len(own)]) <= EACH_SAVE_BYTES:
            count += 1
        count = max(1, count)
        self._next[plan] = (start + count) % len(own)
        return tuple(own[(start + more) % len(own)] for more in range(count))

    def done(self, plan: Plan) -> None:
        """All have been compared, once."""
        self._next.setdefault(plan, 0)


@dataclass
class OwnCopies:
    """digests: by number of the leaf. waiting: arrays still to be digested. small: leaves of one small chunk each,
    whose elements are one after the other in `elements`."""

    plan: Plan
    turns: Turns
    digests: dict[int, bytes] = field(default_factory=dict)
    waiting: list[tuple[int, Cut, Any]] = field(default_factory=list)
    small: list[tuple[int, Cut, int]] = field(default_factory=list)
    elements: bytes = b""

    def result(self) -> bytes:
        """The digests, as the receipt has them. Any thread, once; releases the arrays."""
        left = memoryview(self.elements)
        for number, how, size in self.small:
            self.digests[number] = self._digest(how, left[:size])
            left = left[size:]
        while self.waiting:
            number, how, data = self.waiting.pop()
            self.digests[number] = self._of_array(how, data)
        self.turns.done(self.plan)
        runs = holders.each_of(self.plan.held)
        shared = (number for number, run in enumerate(runs) if run.by is None)
        return b"".join(self.digests.get(number, holders.not_compared()) for number in shared)

    def _digest(self, how: Cut, *parts: memoryview) -> bytes:
        """Equal to what the coordinator computes from process 0's receipt, if the values are."""
        stored = (deflated(part) if self.plan.compression else part for part in parts)
        return holders.digest_of_chunks(how.form, [f"{crc32c.crc32c(part):08x}" for part in stored])

    def _of_array(self, how: Cut, data: np.ndarray[Any, Any]) -> bytes:
        whole = whole_box(data.shape)
        parts = (np.ascontiguousarray(data[slices_in(box, whole)]) for box in how.boxes)
        return self._digest(how, *(part.reshape(-1).view(np.uint8).data for part in parts))

    def take(self, flat: Flat) -> None:
        on_devices: list[tuple[int, Cut, Any]] = []
        buffers: list[Any] = []
        for number, run in self.turns.chosen(self.plan):
            leaf, value = flat.spec.leaves[number], flat.values[number]
            if not leaf.in_store:
                self.digests[number] = holders.digest(leaf)
                continue
            how = holders.cut(leaf, run)
            if not isinstance(value, jax.Array):
                self.digests[number] = self._of_array(how, np.asarray(value, dtype=numpy_dtype(leaf.dtype)))
            elif how.whole and how.chunk_bytes <= _SMALL_BYTES and joinable(leaf, value):
                buffers.append(value)
                self.small.append((number, how, how.chunk_bytes))
            else:
                on_devices.append((number, how, as_stored(leaf, value)))
        self.elements = b"".join(buffers)  # a copy: quicker than to hold the buffers
        hosts = jax.device_get([value for _, _, value in on_devices])  # copies at once; of CPU arrays there are none
        self.waiting = [(number, how, host) for (number, how, _), host in zip(on_devices, hosts, strict=True)]


def take(flat: Flat, plan: Plan, turns: Turns) -> OwnCopies:
    """Returns what `result` needs: the caller may then donate or overwrite the state. Main thread."""
    found = OwnCopies(plan, turns)
    found.take(flat)
    return found

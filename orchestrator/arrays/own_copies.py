"""What this process has its own of, while process 0's is stored: its digests, for the coordinator to compare.

Nothing of it is written. Arrays of the host are looked at when they are taken, as the caller may overwrite them; what
is on CPU devices is held, and looked at in the background; accelerators copy theirs to the host first. The first save
of a form compares everything, each later one at most EACH_SAVE_BYTES, in turn: a state of which every host has a whole
copy of its own would hold up training where nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import crc32c
import jax
import numpy as np

from orchestrator import chunks, holders
from orchestrator.arrays.compressed import deflated
from orchestrator.arrays.planning import Plan, as_stored
from orchestrator.records import Box, Held, LeafSpec
from orchestrator.tree import Flat, numpy_dtype

EACH_SAVE_BYTES = 64 << 20


class Turns:
    """Which own copies a save compares, of states of the forms that one writer has."""

    def __init__(self) -> None:
        self._next = WeakKeyDictionary[Plan, int]()  # the first one that the next save compares; of a new form: all

    def chosen(self, plan: Plan) -> tuple[tuple[int, Held], ...]:
        """Of `plan.own`, those that are to be compared now."""
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
    """By number of the leaf: digests, and the arrays that one is still to be made of."""

    plan: Plan
    turns: Turns
    digests: dict[int, bytes] = field(default_factory=dict)
    waiting: dict[int, tuple[LeafSpec, Held, Any]] = field(default_factory=dict)

    def result(self) -> bytes:
        """As the receipt has it. Any thread, once; lets go of the arrays."""
        while self.waiting:
            number, each = self.waiting.popitem()
            self.digests[number] = _digest(*each, self.plan.compression)
        self.turns.done(self.plan)
        runs = holders.each_of(self.plan.held)
        shared = (number for number, run in enumerate(runs) if run.by is None)
        return b"".join(self.digests.get(number, holders.not_compared()) for number in shared)


def take(flat: Flat, plan: Plan, turns: Turns) -> OwnCopies:
    """Of a state that the caller may donate or overwrite when this returns. Main thread."""
    found = OwnCopies(plan, turns)
    chosen, on_devices = turns.chosen(plan), dict[int, Any]()
    for number, run in chosen:
        leaf, value = flat.spec.leaves[number], flat.values[number]
        if not leaf.in_store:
            found.digests[number] = holders.digest(leaf)
        elif isinstance(value, jax.Array):
            on_devices[number] = as_stored(leaf, value)
        else:
            native = np.asarray(value, dtype=numpy_dtype(leaf.dtype))
            found.digests[number] = _digest(leaf, run, native, plan.compression)
    hosts = jax.device_get(list(on_devices.values()))  # all copies under way at once; of CPU arrays there are none
    runs = dict(chosen)
    for number, host in zip(on_devices, hosts, strict=True):
        found.waiting[number] = (flat.spec.leaves[number], runs[number], host)
    return found


def _digest(leaf: LeafSpec, run: Held, data: np.ndarray[Any, Any], compression: bool) -> bytes:
    return holders.digest(leaf, _checksums(leaf, run, data, compression))


def _checksums(leaf: LeafSpec, run: Held, data: np.ndarray[Any, Any], compression: bool) -> Iterator[str]:
    """As process 0's receipt has them of its own copy."""
    whole = Box(start=(0,) * len(leaf.file_shape), stop=leaf.file_shape)
    for box in holders.grid(leaf, run):
        part = data[chunks.within(box, whole)]
        raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        yield f"{crc32c.crc32c(deflated(raw) if compression else raw):08x}"

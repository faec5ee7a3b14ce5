"""What this process has its own of, while process 0's is stored: its digests, for the coordinator to compare.

Nothing of it is written. Arrays of the host are looked at when they are taken, as the caller may overwrite them; what
is on CPU devices is held, and looked at in the background; accelerators copy theirs to the host first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import crc32c
import jax
import numpy as np

from orchestrator import chunks, holders
from orchestrator.arrays.compressed import deflated
from orchestrator.arrays.planning import Plan, as_stored
from orchestrator.records import Box, Held, LeafSpec
from orchestrator.tree import Flat, numpy_dtype


@dataclass
class OwnCopies:
    """By number of the leaf: digests, and the arrays that one is still to be made of."""

    plan: Plan
    digests: dict[int, bytes] = field(default_factory=dict)
    waiting: dict[int, tuple[LeafSpec, Held, Any]] = field(default_factory=dict)

    def result(self) -> bytes:
        """As the receipt has it. Any thread, once; lets go of the arrays."""
        while self.waiting:
            number, each = self.waiting.popitem()
            self.digests[number] = _digest(*each, self.plan.compression)
        runs = holders.each_of(self.plan.held)
        shared = (number for number, run in enumerate(runs) if run.by is None)
        return b"".join(self.digests.get(number, holders.not_compared()) for number in shared)


def take(flat: Flat, plan: Plan) -> OwnCopies:
    """Of a state that the caller may donate or overwrite when this returns. Main thread."""
    found = OwnCopies(plan)
    on_devices: dict[int, Any] = {}
    for number, run in plan.own:
        leaf, value = flat.spec.leaves[number], flat.values[number]
        if not leaf.in_store:
            found.digests[number] = holders.digest(leaf)
        elif isinstance(value, jax.Array):
            on_devices[number] = as_stored(leaf, value)
        else:
            native = np.asarray(value, dtype=numpy_dtype(leaf.dtype))
            found.digests[number] = _digest(leaf, run, native, plan.compression)
    hosts = jax.device_get(list(on_devices.values()))  # all copies under way at once; of CPU arrays there are none
    runs = dict(plan.own)
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

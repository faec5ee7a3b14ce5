"""Host memory of bounded size that arrays go through on their way to accelerators.

A part of them at a time is read into it, copied to the devices, and its memory used again. The reads of the next parts
are under way while one is copied. Where there is page-locked memory, large arrays are read into that: the devices fetch
it by themselves, and twice as fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
from jax.sharding import SingleDeviceSharding

from orchestrator import gc_pause
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.page_locked import Form, ReusedArrays, memory
from orchestrator.arrays.reading.batches import batches
from orchestrator.arrays.reading.buffers import BufferGroup
from orchestrator.arrays.reading.chunk_source import Reading
from orchestrator.arrays.reading.device_arrays import make_arrays
from orchestrator.arrays.reading.host_memory import Arena, Slab

BYTES = 256 << 20  # a rate as with all the memory there is (docs/benchmarks.md)
_PARTS = 4  # that it has room for
LOCKED_BYTES = 1 << 20  # of one leaf: less is copied together with others, from ordinary memory


class Reader(Protocol):
    """What fills buffers of groups."""

    def begin(self, groups: Sequence[BufferGroup], arena: Arena) -> Reading:
        """Begin to read everything that belongs into the groups' buffers, which are `arena`'s unless they have some
        already."""


@dataclass
class _Part:
    """Groups that are in the ring. `copied`: what is made of them."""

    groups: Sequence[BufferGroup]
    bytes: int
    slab: Slab
    locked: list[Any] = field(default_factory=list)
    reading: Reading | None = None
    copied: list[Any] = field(default_factory=list)


class HostRing:
    """most_bytes: of all parts that are being read or copied; what one leaf has on this process goes alone if it is
    more. Main thread."""

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most_bytes = most_bytes or BYTES
        self._held_bytes = 0
        self._page_locked, self._slabs = ReusedArrays(self._most_bytes), list[Slab]()
        self._reading, self._copying = deque[_Part](), deque[_Part]()

    def load(self, reader: Reader, groups: Sequence[BufferGroup], values: list[Any]) -> None:
        """Make the values of the groups' leaves, each at its position in `values`. The last copies may still be under
        way when it returns, as with any array of JAX. Raises what reading raises."""
        self._prepare(groups)
        for some in batches(groups, max(1, self._most_bytes // _PARTS)):
            size = sum(group.bytes for group in some)
            while self._held_bytes and self._held_bytes + size > self._most_bytes:
                self._make_room(values)
            part = self._allocated(some, size)
            part.reading = reader.begin(some, part.slab)
            self._reading.append(part)
            self._place_what_is_read(values)
        while self._reading:
            self._place(values)

    def _prepare(self, groups: Sequence[BufferGroup]) -> None:
        """Have page-locked memory for those that are read first."""
        forms: list[Form] = []
        left = self._most_bytes
        for group in groups:
            left -= group.bytes
            if left < 0:
                break
            forms += _forms(group)
        if forms:
            self._page_locked.prepare(forms)

    def _allocated(self, groups: Sequence[BufferGroup], size: int) -> _Part:
        self._held_bytes += size
        part = _Part(groups, size, Slab())
        for group in groups:
            if (forms := _forms(group)) and (locked := self._page_locked.take(forms)):
                group.locked = locked
                group.buffers = [memory(array).view(group.dtype).reshape(1, *array.shape) for array in locked]
                part.locked += locked
        part.slab = self._slab(sum(group.bytes for group in groups if not group.locked))
        return part

    def _slab(self, size: int) -> Slab:
        """One that has `size` bytes: the smallest that is free and large enough, else the largest, made larger. What it
        has grown by, others that are free give up if all together have more than they may."""
        self._slabs.sort(key=lambda slab: slab.bytes)
        fits = (at for at, slab in enumerate(self._slabs) if slab.bytes >= size)
        slab = self._slabs.pop(next(fits, -1)) if self._slabs else Slab()
        in_use = sum(part.slab.bytes for part in (*self._reading, *self._copying)) + max(size, slab.bytes)
        while self._slabs and in_use + sum(one.bytes for one in self._slabs) > self._most_bytes:
            self._slabs.pop()
        slab.reset(size)
        return slab

    def _make_room(self, values: list[Any]) -> None:
        """Some of the memory can be used again afterwards. There is always something to copy, if possible."""
        self._place_what_is_read(values)
        if not self._copying or (len(self._copying) < 2 and self._reading):
            self._place(values)
        else:
            self._reuse(self._copying.popleft())

    def _place_what_is_read(self, values: list[Any]) -> None:
        while self._reading and (first := self._reading[0].reading) and first.is_done():
            self._place(values)

    @in_own_context
    def _place(self, values: list[Any]) -> None:
        """Begin to copy the part that was begun first."""
        part = self._reading.popleft()
        assert part.reading is not None
        part.reading.result()
        locked = [group for group in part.groups if group.locked]
        targets = [[_target(group, array) for array in group.locked] for group in locked]
        for group, copied in zip(locked, jax.device_put([group.locked for group in locked], targets), strict=True):
            group.owned = [copied[number] for number in group.layout.buffer_of]
        with gc_pause.paused():
            part.copied = make_arrays(part.groups, values)
        self._copying.append(part)

    @in_own_context
    def _reuse(self, part: _Part) -> None:
        jax.block_until_ready(part.copied)
        self._page_locked.give_back(part.locked)
        self._slabs.append(part.slab)
        self._held_bytes -= part.bytes


def _forms(group: BufferGroup) -> list[Form]:
    """Of page-locked arrays that can be the group's buffers; [] if it is too small for that, if its elements must be
    changed, or if several devices get the same."""
    devices = dict(zip(group.layout.buffer_of, group.layout.devices, strict=True))
    if group.leaf_bytes < LOCKED_BYTES or not group.is_unchanged or len(devices) < len(group.layout.devices):
        return []
    return [(devices[number], shape, group.restored_dtype) for number, shape in enumerate(group.layout.shapes)]


def _target(group: BufferGroup, array: Any) -> SingleDeviceSharding:
    sharding = group.requests[0].sharding
    return SingleDeviceSharding(*array.sharding.device_set, memory_kind=sharding.memory_kind if sharding else None)

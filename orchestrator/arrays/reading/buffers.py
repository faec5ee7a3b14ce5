"""Groups of host buffers that chunks are read into, and that device arrays are then made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.arrays.element_types import bit_count
from orchestrator.arrays.memory_kinds import in_default_memory, on_host
from orchestrator.arrays.reading.buffer_layout import BufferLayout, layout_of, region_layout
from orchestrator.arrays.reading.host_memory import SMALL_BYTES, Arena, Array, aligned_bytes
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.rules.kept import kept
from orchestrator.rules.records import Box, LeafSpec


@dataclass
class BufferGroup:
    """Leaves of one form that are read together: for each region that this process needs one host buffer, whose first
    dimension is the leaf.

    positions: of the leaves among all that were requested. names: of the leaves. owned: where the buffers are memory of
    XLA's own, the array on each device that they belong to; replicas: then, (to, from) of devices that get the same
    elements. locked: where they are page-locked, the array that each of them is.
    """

    requests: Sequence[ReadRequest]
    layout: BufferLayout
    positions: Sequence[int] = (0,)
    names: Sequence[str] = ()
    buffers: list[Array] = field(default_factory=list)
    owned: list[Any] = field(default_factory=list)
    replicas: list[tuple[Array, Array]] = field(default_factory=list)
    locked: list[Any] = field(default_factory=list)

    @property
    def leaf(self) -> LeafSpec:
        """The same for all leaves of the group, except for its path."""
        return self.requests[0].leaf

    def keys(self, suffix: str) -> list[str]:
        """Of the chunk whose key ends with `suffix`, of all leaves."""
        return [name + suffix for name in self.names or [request.leaf.name for request in self.requests]]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the buffers: as stored."""
        return self.requests[0].stored_dtype

    @property
    def restored_dtype(self) -> np.dtype[Any]:
        """Of the restored arrays."""
        dtype: np.dtype[Any] = self.requests[0].converted(np.empty(0, self.dtype)).dtype
        return dtype

    @property
    def leaf_bytes(self) -> int:
        """Of the buffers of one leaf."""
        return sum(aligned_bytes(math.prod(shape) * self.dtype.itemsize) for shape in self.layout.shapes)

    @property
    def bytes(self) -> int:
        """Of all buffers."""
        return len(self.requests) * self.leaf_bytes

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk, without its checksum, as far as the tree spec says."""
        return math.prod(self.leaf.chunk or ()) * self.dtype.itemsize

    @property
    def is_unchanged(self) -> bool:
        """Whether the elements of its one leaf become arrays of the devices as they are read, all of one shape."""
        request, layout = self.requests[0], self.layout
        if request.sharding is None or request.frame or not layout.devices or len(self.requests) > 1:
            return False
        uncast = ReadRequest(self.leaf).converted(np.empty(0, self.dtype)).dtype
        whole_bytes = bit_count(self.restored_dtype) >= 8  # XLA may pack others
        alike = len(set(layout.shapes)) == 1 and in_default_memory(request.sharding)
        return alike and whole_bytes and self.restored_dtype == uncast

    @property
    def for_accelerator(self) -> bool:
        """Whether the buffers are copied to an accelerator's memory."""
        sharding = self.requests[0].sharding
        return sharding is not None and not on_host(sharding)

    def allocate(self, arena: Arena) -> None:
        """Take buffers from `arena`, unless there are some already. Raises MemoryError."""
        if not self.buffers:
            count, dtype = len(self.requests), self.dtype
            self.buffers = [arena.arrays(count, shape, dtype) for shape in self.layout.shapes]

    def release(self) -> None:
        """Hold no buffer any more; device arrays may."""
        self.buffers, self.owned, self.replicas, self.locked = [], [], [], []


def grouped(requests: Sequence[ReadRequest]) -> list[BufferGroup]:
    """Groups of the requested leaves that files hold. A large leaf comes alone, small ones of one form come together,
    so that whatever has to be done is done for all of them at once. Raises Damaged as `layout_of`."""
    found = _kept_groups(requests) if isinstance(requests, tuple) else _groups(requests)
    return [BufferGroup(*group) for group in found]


_Group = tuple[Sequence[ReadRequest], BufferLayout, Sequence[int], Sequence[str]]


def _groups(requests: Sequence[ReadRequest]) -> list[_Group]:
    forms: dict[Any, list[int]] = {}
    for position, request in enumerate(requests):
        leaf = request.leaf
        if leaf.in_store:
            form = (leaf.shape, leaf.dtype, leaf.chunk, request.sharding, request.dtype, leaf.kind, leaf.stored_shape)
            forms.setdefault((*form, leaf.stored_dtype, leaf.value, request.frame), []).append(position)
    groups: list[_Group] = []
    for positions in forms.values():
        first = requests[positions[0]]
        alone = BufferGroup((first,), layout_of(first))
        count = max(1, SMALL_BYTES // max(1, alone.leaf_bytes))
        for at in range(0, len(positions), count):
            some = positions[at : at + count]
            together = [requests[position] for position in some]
            groups.append((together, alone.layout, some, [request.leaf.name for request in together]))
    return sorted(groups, key=lambda group: group[2][0])  # about as the files have them


# A process that restores into the same form again has the same requests.
_kept_groups: Callable[[tuple[ReadRequest, ...]], list[_Group]] = kept(_groups)


def bytes_to_read(requests: Sequence[ReadRequest]) -> int:
    """How many bytes of arrays a restore of these reads on this process at most: a chunk counts whole, also where only
    a part of it is read, and a compressed one as what it becomes. Raises Damaged as `layout_of`."""
    total = 0
    for group in grouped(requests):
        of_leaf = group.chunk_bytes * len(group.layout.reads)
        if not of_leaf:  # compressed: how it is cut is not known yet
            of_leaf = sum(map(math.prod, group.layout.shapes)) * group.dtype.itemsize
        total += len(group.requests) * of_leaf
    return total


def region_of(leaf: LeafSpec, box: Box) -> BufferGroup:
    """A region of a leaf, as stored, for one buffer on the host. Raises Damaged as `layout_of`."""
    return BufferGroup((ReadRequest(leaf),), region_layout(leaf, box))

"""Arithmetic on boxes: the half-open regions of an array's index space that shards, chunks and receipts are. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from orchestrator.rules.records import Box


def whole_box(shape: tuple[int, ...]) -> Box:
    """All of an array."""
    return Box(start=(0,) * len(shape), stop=shape)


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """A shard's index as a box; dimensions beyond the index (of key data) are whole."""
    full = (*index, *(slice(None),) * (len(shape) - len(index)))
    bounds = [part.indices(size) for part, size in zip(full, shape, strict=True)]
    return Box(start=tuple(bound[0] for bound in bounds), stop=tuple(bound[1] for bound in bounds))


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in zip(box.start, box.stop, strict=True))


def volume(box: Box) -> int:
    """How many elements it holds."""
    return math.prod(shape_of(box))


def moved(box: Box, origin: tuple[int, ...]) -> Box:
    """The box as seen from `origin`."""
    bounds = [[at - first for at, first in zip(given, origin, strict=True)] for given in (box.start, box.stop)]
    return Box(start=tuple(bounds[0]), stop=tuple(bounds[1]))


def slices_in(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where `box` is in an array that holds `outer`."""
    return tuple(
        slice(start - first, stop - first) for start, stop, first in zip(box.start, box.stop, outer.start, strict=True)
    )


def is_inside(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a box that anybody may have written is a region of such an array, and not an empty one."""
    return len(box.start) == len(box.stop) == len(shape) and all(
        0 <= start < stop <= size for start, stop, size in zip(box.start, box.stop, shape, strict=True)
    )


def overlap(a: Box, b: Box) -> bool:
    """Whether they share an element."""
    return all(a.start[axis] < b.stop[axis] and b.start[axis] < a.stop[axis] for axis in range(len(a.start)))


def intersection(a: Box, b: Box) -> Box:
    """The part that two boxes share; no box (a start beyond its stop) if they share nothing."""
    return Box(start=tuple(map(max, a.start, b.start)), stop=tuple(map(min, a.stop, b.stop)))


def are_disjoint(boxes: Iterable[Box]) -> bool:
    """No two boxes share an element. Sorted sweep along the first dimension: near-linear for a sharding's grid."""
    active: list[Box] = []
    for box in sorted(boxes, key=lambda each: each.start):
        active = [old for old in active if not box.start or old.stop[0] > box.start[0]]
        if any(overlap(old, box) for old in active):
            return False
        active.append(box)
    return True


def box_label(box: Box) -> str:
    """A region as people write it: `[0:8,4:8]`, '' for an array without dimensions."""
    bounds = ",".join(f"{start}:{stop}" for start, stop in zip(box.start, box.stop, strict=True))
    return f"[{bounds}]" if bounds else ""

"""Which process reads which part of an array that several of them need. Pure: chunks and devices are numbers here.

An array is cut along the bounds of its chunks into one slab for each device, all of one size, since that is what a
sharding can say; so every chunk is read once, by the process that the slab's device belongs to. Where chunks cannot be
dealt out evenly, the array is laid into a larger frame of whole slabs, and nobody reads what lies around it. It is laid
there so that all processes read about as much of all arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.rules import zarr_chunks
from orchestrator.rules.records import Box

_TRIES = 16  # of the places where an array can lie in its frame


@dataclass(frozen=True)
class Division:
    """An array in its frame, cut into slabs.

    axes: a mesh's shape, by which devices are numbered in C order. cuts: by which of the axes each dimension is cut,
    the most significant first. shape: of the frame. start: where in it the array begins.
    """

    axes: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    start: tuple[int, ...]

    @functools.cached_property
    def slabs(self) -> tuple[int, ...]:
        """How many each dimension is cut into."""
        return tuple(math.prod(self.axes[axis] for axis in cut) for cut in self.cuts)

    @property
    def slab(self) -> tuple[int, ...]:
        """A slab's shape."""
        return tuple(size // count for size, count in zip(self.shape, self.slabs, strict=True))


def is_shared(boxes: Iterable[tuple[int, Box]], chunk: tuple[int, ...]) -> bool:
    """Whether two processes need the same chunk, given the regions that each needs as (process, region)."""
    owners: dict[tuple[int, ...], int] = {}
    return any(
        owners.setdefault(one.start, process) != process
        for process, box in dict.fromkeys(boxes)
        for one in zarr_chunks.touching(box, chunk)
    )


def divide(
    shape: tuple[int, ...], chunk: tuple[int, ...], owners: Sequence[int], held: Sequence[float] = (), turn: int = 0
) -> Division:
    """How to read an array on devices of the processes `owners`, in the devices' order. `chunk` divides `shape`.
    held: how many such chunks each process reads anyway. turn: where the search for an even division begins."""
    grid = tuple(size // step for size, step in zip(shape, chunk, strict=True))
    # Neighbouring devices mostly belong to one process: axes of processes, then of the devices of each.
    run = next((at for at, owner in enumerate(owners) if owner != owners[0]), len(owners))
    axes = (*_factors(len(owners) // run), *_factors(run)) if len(owners) % run == 0 else _factors(len(owners))
    cuts: list[list[int]] = [[] for _ in grid]
    rest = list(grid)
    for axis, size in enumerate(axes):
        # Where it leaves the least of the frame empty; of equals the first, so that slabs are long runs of the array.
        larger = [-(-count // size) * size / count for count in rest]
        number = larger.index(min(larger))
        cuts[number].append(axis)
        rest[number] = -(-rest[number] // size)
    frame = [math.prod(axes[axis] for axis in cut) * size for cut, size in zip(cuts, rest, strict=True)]
    shifts = [size - count + 1 for size, count in zip(frame, grid, strict=True)]
    # In the other order, neighbouring slabs are of different processes: where some are empty, that is more even.
    orders = [cuts, [cut[::-1] for cut in cuts]] if max(shifts) > 1 else [cuts]
    tries = [
        Division(axes, tuple(map(tuple, order)), *(tuple(map(int.__mul__, given, chunk)) for given in (frame, start)))
        for start in _starts(shifts, turn)
        for order in orders
    ]
    return min(tries, key=lambda one: _unevenness(one, shape, chunk, owners, held)) if len(tries) > 1 else tries[0]


def _starts(shifts: Sequence[int], turn: int) -> Iterator[list[int]]:
    """Some of the places where an array can lie in its frame, from that of `turn` on."""
    count = math.prod(shifts)
    for number in range(turn, turn + count, -(-count // _TRIES)):
        start = []
        for shift in shifts:
            number, at = divmod(number, shift)
            start.append(at)
        yield start


def _unevenness(
    division: Division, shape: tuple[int, ...], chunk: tuple[int, ...], owners: Sequence[int], held: Sequence[float]
) -> float:
    """The sum of squares of how many chunks each process reads."""
    read = np.array(reads(division, shape, chunk, owners), float)
    read[: len(held)] += held[: len(read)]
    return float(read @ read)


def reads(division: Division, shape: tuple[int, ...], chunk: tuple[int, ...], owners: Sequence[int]) -> tuple[int, ...]:
    """How many chunks each process reads, by its number."""
    filled = [
        _filled(np.arange(count) * slab, slab, first, first + size) // step
        for size, step, slab, first, count in zip(
            shape, chunk, division.slab, division.start, division.slabs, strict=True
        )
    ]
    order = [axis for cut in division.cuts for axis in cut]
    by_slab = functools.reduce(np.multiply.outer, filled).reshape([division.axes[axis] for axis in order])
    by_device = by_slab.transpose(np.argsort(order)).ravel()
    return tuple(np.bincount(np.asarray(owners), weights=by_device).astype(int).tolist())


def _filled(starts: Any, slab: int, first: int, last: int) -> Any:
    return np.clip(np.minimum(starts + slab, last) - np.maximum(starts, first), 0, None)


@functools.lru_cache(maxsize=64)
def _factors(number: int) -> tuple[int, ...]:
    """Its prime factors, the largest first."""
    found = []
    factor = 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return tuple(found[::-1])

"""Which process reads which slab: every chunk by exactly one device, evenly, and just as JAX places the slabs."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orchestrator.arrays.reading.dividing import Division, divide, is_shared, reads
from orchestrator.rules import zarr_chunks
from orchestrator.rules.boxes import box_of, intersection, moved, whole_box
from orchestrator.rules.records import Box

GRIDS = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
CHUNKS = st.lists(st.integers(1, 3), min_size=3, max_size=3)
OWNERS = st.one_of(
    st.builds(lambda hosts, devices: [at // devices for at in range(hosts * devices)], *[st.integers(1, 6)] * 2),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),  # in any order, and not as many of each
)


def slabs(division: Division) -> list[Box]:
    """Of each device, in the array's own coordinates: what a mesh of `axes` and a spec of `cuts` mean."""
    found = []
    for place in itertools.product(*map(range, division.axes)):
        start = []
        for cut, size, first in zip(division.cuts, division.slab, division.start, strict=True):
            number = 0
            for axis in cut:
                number = number * division.axes[axis] + place[axis]
            start.append(number * size - first)
        stop = tuple(map(int.__add__, start, division.slab))
        found.append(Box(start=tuple(start), stop=stop))
    return found


def chunks_of(box: Box, shape: tuple[int, ...], chunk: tuple[int, ...]) -> list[Box]:
    inside = intersection(box, whole_box(shape))
    if any(start >= stop for start, stop in zip(inside.start, inside.stop, strict=True)):
        return []
    assert all(at % size == 0 for at, size in zip((*inside.start, *inside.stop), (*chunk, *chunk), strict=True))
    return list(zarr_chunks.cut(inside, chunk))


@settings(max_examples=300, deadline=None)
@given(GRIDS, CHUNKS, OWNERS, st.lists(st.floats(0, 9), max_size=6), st.integers(0, 50))
def test_every_chunk_is_in_exactly_one_slab_and_no_slab_is_larger_than_it_must_be(
    grid: tuple[int, ...], sizes: list[int], owners: list[int], held: list[float], turn: int
) -> None:
    chunk = tuple(sizes[: len(grid)])
    shape = tuple(map(int.__mul__, grid, chunk))
    division = divide(shape, chunk, owners, held, turn)
    assert math.prod(division.axes) == math.prod(division.slabs) == len(owners)
    read = Counter(one for box in slabs(division) for one in chunks_of(box, shape, chunk))
    by_owner = Counter(dict.fromkeys(range(max(owners) + 1), 0))
    for owner, box in zip(owners, slabs(division), strict=True):
        by_owner[owner] += len(chunks_of(box, shape, chunk))
    assert reads(division, shape, chunk, owners) == tuple(by_owner[owner] for owner in sorted(by_owner))
    assert read == Counter(zarr_chunks.cut(whole_box(shape), chunk))
    for size, slab, count, step in zip(shape, division.slab, division.slabs, chunk, strict=True):
        assert slab == -(-size // (count * step)) * step, "the fewest chunks that many slabs can do with"


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(["together", "in turn"]),
    st.integers(0, 9),
)
def test_processes_of_equal_size_read_as_much_but_for_one_slab(
    count: int, hosts: int, devices: int, order: str, turn: int
) -> None:
    owners = [at // devices if order == "together" else at % hosts for at in range(hosts * devices)]
    division = divide((count, 7), (1, 7), owners, turn=turn)
    read = Counter(dict.fromkeys(range(hosts), 0))
    for owner, box in zip(owners, slabs(division), strict=True):
        read[owner] += len(chunks_of(box, (count, 7), (1, 7)))
    assert max(read.values()) - min(read.values()) <= division.slab[0]


def test_two_dimensions_are_cut_where_one_has_too_few_chunks() -> None:
    assert divide((16, 16), (1, 1), range(256)).slabs == (16, 16)
    assert divide((32, 6), (16, 1), range(12)).slabs == (2, 6)
    assert divide((64, 8), (4, 8), range(8)).slabs == (8, 1), "and rows alone where they do"


def test_arrays_of_few_chunks_are_spread_over_the_processes() -> None:
    owners = [at // 3 for at in range(12)]
    for counts in ([1] * 10, [2] * 6, [1, 1, 2, 3, 3, 1, 5, 7, 2, 1, 4, 3]):
        held = [0.0] * 4
        for turn, count in enumerate(counts):
            division = divide((count, 4), (1, 4), owners, held, turn)
            held = [old + more for old, more in zip(held, reads(division, (count, 4), (1, 4), owners), strict=True)]
        assert sum(held) == sum(counts)
        assert max(held) - min(held) <= 1


def test_slabs_are_where_jax_puts_them() -> None:
    devices = jax.devices()
    for grid, turn in (((5, 3), 1), ((2, 2), 0), ((1, 7), 4)):
        division = divide(grid, (1, 1), [device.id % 2 for device in devices], turn=turn)
        names = [f"axis{number}" for number in range(len(division.axes))]
        mesh = Mesh(np.array(devices).reshape(division.axes), names)
        spec = PartitionSpec(*(tuple(names[axis] for axis in cut) or None for cut in division.cuts))
        regions = NamedSharding(mesh, spec).devices_indices_map(division.shape)
        placed = [moved(box_of(regions[device], division.shape), division.start) for device in devices]
        assert placed == slabs(division)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=5))
def test_sharing_is_seen_exactly_where_two_processes_touch_a_chunk(wants: list[tuple[int, int, int]]) -> None:
    rows = 4  # of a chunk
    boxes = [(process, Box(start=(at, 0), stop=(at + size, 1))) for process, at, size in wants]
    wanted: dict[int, set[int]] = {}
    for process, at, size in wants:
        for row in range(at, at + size):
            wanted.setdefault(row // rows, set()).add(process)
    assert is_shared(boxes, (rows, 1)) == any(len(who) > 1 for who in wanted.values())

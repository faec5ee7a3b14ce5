"""The memory that restored arrays are read into."""

from __future__ import annotations

import gc
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from orchestrator.arrays import placing
from orchestrator.arrays.placing import Arena

SIZES = [1, 63, 64, 65, 1000, 100_000, 1 << 20, (1 << 20) + 4, 2 << 20, (2 << 20) + 4, 5 << 20, 3, 16 << 20, 7]


def flags(address: int) -> set[str]:
    """Of the mapping that holds an address, as Linux tells them."""
    text = Path("/proc/self/smaps").read_text()
    for low, high, told in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: ([^\n]*)$", text, re.M | re.S):
        if int(low, 16) <= address < int(high, 16):
            return set(told.split())
    raise AssertionError("not mapped")


def test_buffers_are_aligned_and_none_overlaps_another() -> None:
    arena = Arena(sum(3 * placing._step(size) for size in SIZES))
    buffers = [arena.arrays(3, (size,), np.dtype(np.uint8)) for size in SIZES]
    rows = [row for buffer in buffers for row in buffer]
    assert all(row.ctypes.data % 64 == 0 and row.flags.c_contiguous and row.flags.writeable for row in rows)
    for number, row in enumerate(rows):
        row[:] = number
    assert all((row == number).all() for number, row in enumerate(rows))


def test_an_arena_that_is_told_too_little_still_gives_what_is_asked_for() -> None:
    arena = Arena(0)
    assert [arena.arrays(1, (), np.dtype(np.float32)).shape for _ in range(3)] == [(1,)] * 3
    assert arena.arrays(2, (3, 4), np.dtype(np.float32)).shape == (2, 3, 4)


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="Linux with large pages",
)
@pytest.mark.parametrize(("count", "size"), [(1, 16 << 20), (40, 1 << 20)], ids=["one large", "many of 1 MiB"])
def test_memory_for_much_is_asked_for_in_large_pages_and_given_back_with_its_last_buffer(count: int, size: int) -> None:
    arena = Arena(count * size)
    buffers = [arena.arrays(1, (size,), np.dtype(np.uint8)) for _ in range(count)]
    assert all("hg" in flags(buffer.ctypes.data) for buffer in buffers)
    assert buffers[0].ctypes.data % (2 << 20) == 0
    # Shared by at most 16 MiB of buffers: the others may go while one stays.
    kept, gone = buffers[0], [weakref.ref(mapping(buffer)) for buffer in buffers]
    del arena, buffers
    gc.collect()
    assert sum(one() is not None for one in gone) <= (16 << 20) // size
    kept[:] = 1


def mapping(buffer: np.ndarray) -> object:  # type: ignore[type-arg]
    """The mapping that an array is a part of."""
    base = buffer.base
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base.obj if isinstance(base, memoryview) else base

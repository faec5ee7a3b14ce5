"""The memory that restored arrays are read into."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.arrays.reading.host_memory import Arena

SIZES = [1, 63, 64, 65, 1000, 100_000, 1 << 20, (1 << 20) + 4, 2 << 20, (2 << 20) + 4, 5 << 20, 3, 16 << 20, 7]

LARGE_PAGE = 2 << 20


def flags(address: int) -> set[str]:
    """Of the mapping that holds an address, as Linux tells them."""
    text = Path("/proc/self/smaps").read_text()
    for low, high, told in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: ([^\n]*)$", text, re.M | re.S):
        if int(low, 16) <= address < int(high, 16):
            return set(told.split())
    raise AssertionError("not mapped")


def test_buffers_are_aligned_and_none_overlaps_another() -> None:
    arena = Arena()
    buffers = [arena.arrays(3, (size,), np.dtype(np.uint8)) for size in SIZES]
    rows = [row for buffer in buffers for row in buffer]
    assert all(row.ctypes.data % 64 == 0 and row.flags.c_contiguous and row.flags.writeable for row in rows)
    for number, row in enumerate(rows):
        row[:] = number
    assert all((row == number).all() for number, row in enumerate(rows))


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="Linux with large pages",
)
@pytest.mark.parametrize("size", [4 << 20, (5 << 20) + 4, 16 << 20])
def test_a_large_buffer_is_asked_for_in_large_pages_whole_ones_only(size: int) -> None:
    (buffer,) = Arena().arrays(1, (size,), np.dtype(np.uint8))
    assert buffer.ctypes.data % LARGE_PAGE == 0
    told = ["hg" in flags(buffer.ctypes.data + at) for at in range(0, size, LARGE_PAGE)]
    assert told == [True] * (size // LARGE_PAGE) + [False] * (size % LARGE_PAGE > 0)

"""Aligned memory on the host that chunks are read into."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np

SHARED_BYTES = 1 << 20  # small buffers share one allocation of this size
SMALL_BYTES = SHARED_BYTES // 8
LARGE_PAGE_BYTES = 2 << 20
LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_ALIGNMENT = 64  # XLA takes over a host buffer without a copy only if it is aligned so
_LARGE_BYTES = 2 * LARGE_PAGE_BYTES
_PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}

Array = np.ndarray[Any, Any]


class Arena:
    """Aligned buffers. Small ones share an allocation, which lives as long as any of them."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def arrays(self, count: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """`count` arrays, each aligned, as one array with a dimension more. Raises MemoryError."""
        size = math.prod(shape) * dtype.itemsize
        step = aligned_bytes(size)
        rows = self._take(count * step).reshape(count, step)[:, :size]
        return rows.view(dtype).reshape(count, *shape)

    def _take(self, size: int) -> Array:
        if size >= _LARGE_BYTES:
            return _in_large_pages(size)
        if size > SMALL_BYTES:
            return _aligned(size)
        if self._used + size > len(self._memory):
            self._memory, self._used = _aligned(SHARED_BYTES), 0
        self._used += size
        return self._memory[self._used - size : self._used]


class Slab(Arena):
    """Aligned buffers in one allocation that is used again, for arrays that are copied to accelerators: fresh memory
    for all of them would cost more time than the copies, and as much memory as the state has."""

    @property
    def bytes(self) -> int:
        """That it has."""
        return len(self._memory)

    def reset(self, size: int) -> None:
        """Hand out `size` bytes from now on; buffers handed out before lie in the same memory."""
        if size > len(self._memory):
            self._memory = _in_large_pages(size)
        self._used = 0

    def _take(self, size: int) -> Array:
        self._used += size
        assert self._used <= len(self._memory)
        return self._memory[self._used - size : self._used]


def aligned_bytes(size: int) -> int:
    """From the beginning of a buffer of `size` bytes to the next one."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _aligned(size: int) -> Array:
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size]


def _in_large_pages(size: int) -> Array:
    """An allocation of its own, in large pages where Linux gives them. numpy asks for large pages too, but begins
    anywhere: 2 MiB of each array would be in small pages, each with a page fault of its own."""
    try:
        memory = mmap.mmap(-1, size + LARGE_PAGE_BYTES, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"{size} bytes for an array: {error}") from error
    raw = np.frombuffer(memory, np.uint8)
    first = -raw.ctypes.data % LARGE_PAGE_BYTES
    if LARGE_PAGES is not None:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(LARGE_PAGES, first, size // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES)
    return raw[first : first + size]


def reserve(size: int) -> None:
    """Raises MemoryError if `size` bytes cannot be had. To be asked before a library allocates them itself, which would
    end the process."""
    if size > SHARED_BYTES:
        _in_large_pages(size)

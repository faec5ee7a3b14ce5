"""Reading only those parts of a chunk that somebody needs, each checked by itself.

A chunk is read whole for its checksum, though another mesh may need little of it on this process. The CRC-32Cs of its
parts follow it in the data file (`zarr_chunks.parts`): those are right if together they make the chunk's own, which the
manifest has. Nothing else says that they are there: steps of earlier versions have none.
"""

from __future__ import annotations

from collections.abc import Sequence

import crc32c
import numpy as np

from orchestrator.arrays.reading.chunk_checks import ChunkChecks
from orchestrator.arrays.reading.chunk_source import ChunkFiles, ChunkRead
from orchestrator.arrays.reading.host_memory import Array
from orchestrator.errors import Suspect
from orchestrator.rules import zarr_chunks
from orchestrator.rules.chunk_index import Location
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES, PART_BYTES

_RUNS = 4096  # of needed elements in a chunk; of more, thinner ones all parts are needed anyway
_WORTH_IT = 0.75  # of the chunk: to save less takes longer than to read it in one go


class ChunkParts:
    """Of the chunks of one store. Any thread."""

    def __init__(self, store: ChunkFiles, checks: ChunkChecks) -> None:
        self._store, self._checks = store, checks

    def read(self, read: ChunkRead, place: Location, scratch: Array) -> int:
        """Read those parts that a chunk's destinations need, each at its place in `scratch`, and check them. Returns
        how many bytes that were. 0: read the chunk whole; it has no parts, all are needed, or one of them, or what
        should be their checksums, is not as it was saved, which the whole chunk will say better. Raises Unavailable."""
        parts = [] if read.compressed else zarr_chunks.parts(read.bytes)
        chosen = _needed(read) if parts else []
        wanted_bytes = sum(parts[number][1] - parts[number][0] for number in chosen)
        if not chosen or wanted_bytes > _WORTH_IT * read.bytes:
            return 0
        try:
            checksums = self._checksums(read, place, len(parts))
            if checksums and all(self._is_right(read, place, scratch, parts[at], checksums[at]) for at in chosen):
                return wanted_bytes
        except Suspect:
            pass
        return 0

    def _checksums(self, read: ChunkRead, place: Location, count: int) -> Sequence[int]:
        """Of each part; () if there are none that make the chunk's."""
        path, offset, _ = place
        body = bytearray(CHECKSUM_BYTES * (1 + count))
        self._store.read(memoryview(body), (path, offset + read.bytes, len(body)), read.label)
        whole, *parts = np.frombuffer(body, "<u4").tolist()
        is_ours = not self._checks.other_save(read.key, whole)
        return parts if is_ours and zarr_chunks.joined_crc32c(parts, read.bytes) == whole else ()

    def _is_right(self, read: ChunkRead, place: Location, scratch: Array, part: tuple[int, int], checksum: int) -> bool:
        first, end = part
        body = scratch.data[first:end]
        self._store.read(body, (place[0], place[1] + first, end - first), read.label)
        return crc32c.crc32c(body) == checksum


def _needed(read: ChunkRead) -> list[int]:
    """The numbers of the parts that hold any element that is needed; [] if there are too many runs of elements."""
    item_bytes, count = read.group.dtype.itemsize, -(-read.bytes // PART_BYTES)
    changes = np.zeros(count + 1, np.int64)  # how many runs begin in a part, less those that have ended before it
    for destination in read.destinations:
        starts, run_bytes = _runs(read.shape, [(one.start, one.stop) for one in destination.part], item_bytes)
        if len(starts) > _RUNS:
            return []
        np.add.at(changes, starts // PART_BYTES, 1)
        np.add.at(changes, (starts + run_bytes - 1) // PART_BYTES + 1, -1)
    numbers: list[int] = np.flatnonzero(np.cumsum(changes[:-1])).tolist()
    return numbers


def _runs(shape: tuple[int, ...], bounds: Sequence[tuple[int, int]], item_bytes: int) -> tuple[Array, int]:
    """The runs of bytes that a region of an array consists of: where each begins, in any order, or
    _RUNS + 1 of them; their size."""
    axis, run_bytes = len(shape), item_bytes
    while axis and bounds[axis - 1] == (0, shape[axis - 1]):
        axis -= 1
        run_bytes *= shape[axis]
    stride = run_bytes
    starts = np.zeros(1, np.int64)
    if axis:
        axis -= 1
        first, end = bounds[axis]
        starts, run_bytes, stride = starts + first * stride, (end - first) * stride, shape[axis] * stride
    for size, (first, end) in zip(shape[:axis][::-1], bounds[:axis][::-1], strict=True):
        starts = (starts[:, None] + stride * np.arange(first, end)).ravel()[: _RUNS + 1]
        stride *= size
    return starts, run_bytes

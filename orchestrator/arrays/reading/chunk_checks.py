"""Whether a chunk that was read is the one that was saved; if so, its elements are put where they belong.

A chunk is checked in three ways: by its size, by the CRC-32C that it ends with, and by the one in the step's manifest,
which tells another save's chunk from this one's. Whatever is wrong is a Suspect: one read proves nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import crc32c
import numpy as np

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.format.compressed import inflated
from orchestrator.arrays.reading.buffers import BufferGroup
from orchestrator.arrays.reading.chunk_source import ChunkRead
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.errors import Damaged, Suspect, Unavailable
from orchestrator.rules import zarr_chunks
from orchestrator.rules.keys import STATE
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES

_WHOLE = crc32c.crc32c(bytes(CHECKSUM_BYTES))  # of any bytes that end with their own CRC-32C


class ChunkChecks:
    """The checks of the chunks in one directory. Any thread.

    checksums: by key, as the manifest has them; {} where it is not known. files_of: the files below the directory that
    a chunk comes from, as far as they are known, by its key.
    """

    def __init__(
        self, directory: str, checksums: Mapping[str, str], files_of: Callable[[str], Sequence[str]] = lambda key: ()
    ) -> None:
        self._directory, self._checksums, self._files_of = directory, checksums, files_of

    def suspect(self, read: ChunkRead, text: str) -> Suspect:
        files = [STATE + path for path in self._files_of(read.key)]
        return Suspect(f"{read.label}: {text}", files=files, chunks=[read.key])

    def missing(self, read: ChunkRead) -> Suspect:
        return self.suspect(read, f"chunk {read.key} is missing in {self._directory}")

    def check_size(self, read: ChunkRead, size: int) -> None:
        """To be asked before memory is allocated for the chunk. Noise grows by less than a hundredth when it is
        compressed. Raises Suspect."""
        expected = read.bytes + CHECKSUM_BYTES
        if size != expected and not (read.compressed and CHECKSUM_BYTES < size <= expected + expected // 64 + 1024):
            text = f"chunk {read.key} in {self._directory} has {size} bytes, expected {expected}"
            raise self.suspect(read, text)

    def check_crc(self, read: ChunkRead, computed: int, stored: int) -> None:
        """Whether the chunk has the CRC-32C that it ends with, and is of this save. Raises Suspect."""
        if computed != stored:
            text = f"chunk {read.key} in {self._directory}: crc32c {computed:08x}, written {stored:08x}"
            raise self.suspect(read, text)
        if problem := self.other_save(read.key, stored):
            raise self.suspect(read, problem)

    def other_save(self, key: str, stored: int) -> str:
        """What is wrong with a chunk that ends with this CRC-32C, '' if it is this save's."""
        expected = self._checksums.get(key)
        if not self._checksums or expected == f"{stored:08x}":
            return ""
        where = f"chunk {key} in {self._directory}"
        return f"{where} ends with crc32c {stored:08x}, the manifest says {expected}; it belongs to another save"

    def deliver(self, read: ChunkRead, body: bytes | memoryview) -> None:
        """Check a chunk that was read into memory of its own, and copy its parts to their destinations. Raises as
        `check_crc` and `unpack`."""
        raw, tail = memoryview(body)[:-CHECKSUM_BYTES], body[-CHECKSUM_BYTES:]
        self.check_crc(read, crc32c.crc32c(raw), int.from_bytes(tail, "little"))
        self.unpack(read, raw)

    def unpack(self, read: ChunkRead, raw: bytes | memoryview) -> None:
        """Copy the parts of a checked chunk to their destinations. Raises Damaged for what is no chunk that was
        compressed."""
        if read.compressed:
            raw = inflated(raw, read.bytes, lambda: f"{read.label}: chunk {read.key} in {self._directory}")
        self.place(read, raw)

    def place(self, read: ChunkRead, raw: bytes | memoryview) -> None:
        """Copy the parts of a chunk to their destinations. What lies beside them does not matter."""
        source = np.frombuffer(raw, read.group.dtype).reshape(read.shape)
        for destination in read.destinations:
            read.view(destination)[...] = source[destination.part]

    def fill_from_index(self, group: BufferGroup, index: StoredIndex) -> bool:
        """Fill the buffers of a group from chunks that the index holds itself, the same chunk of all leaves at once.
        False if not every one is there, whole and of this save: reading them one by one then finds out which."""
        size, chunk = group.chunk_bytes + CHECKSUM_BYTES, group.leaf.chunk
        if chunk is None or size > ocdbt.INLINE_BYTES:
            return False
        for suffix, destinations in group.layout.reads:
            keys = group.keys(suffix)
            bodies = index.inline(keys, size)
            # One CRC of them all: each ends with its own, so that of whole ones it is a known number.
            if bodies is None or crc32c.crc32c(bodies.data) != _of_whole_chunks(len(keys), size):
                return False
            stored = bodies[:, : -CHECKSUM_BYTES - 1 : -1].tobytes().hex()  # little-endian
            if self._checksums and stored != "".join(map(self._checksums.get, keys, itertools.repeat(""))):
                return False
            elements = bodies[:, :-CHECKSUM_BYTES].view(group.dtype).reshape(len(keys), *chunk)
            for part in destinations:
                group.buffers[part.buffer][(slice(None), *part.inside)] = elements[(slice(None), *part.part)]
        return True


@functools.lru_cache(maxsize=256)
def _of_whole_chunks(count: int, size: int) -> int:
    """The CRC-32C of so many chunks of `size` bytes one after the other, each of which ends with its own."""
    if count == 1:
        return _WHOLE
    half = count // 2
    doubled = zarr_chunks.combined_crc32c(_of_whole_chunks(half, size), _of_whole_chunks(half, size), half * size)
    return zarr_chunks.combined_crc32c(doubled, _WHOLE, size) if count % 2 else doubled


@contextlib.contextmanager
def suspecting(directory: str) -> Iterator[None]:
    """What was read once proves nothing: whatever makes no sense in it is a suspicion. A lack of memory is neither."""
    try:
        yield
    except Damaged as error:
        raise Suspect(str(error), files=error.files, chunks=error.chunks, structure=True) from error
    except MemoryError as error:
        text = f"{directory}: this process has no memory left to read arrays: {error or 'out of memory'}"
        raise Unavailable(text) from error

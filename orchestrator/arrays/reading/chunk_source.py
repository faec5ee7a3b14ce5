"""The chunks of an attempt's own array store: what is to be read of them, and the port that reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from orchestrator.arrays.format.compressed import chunk_shape
from orchestrator.arrays.reading.buffer_layout import Destination, with_chunks
from orchestrator.arrays.reading.buffers import BufferGroup
from orchestrator.arrays.reading.host_memory import Array
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.rules import zarr_chunks
from orchestrator.rules.chunk_index import Chunk, Location

OnBytes = Callable[[int], None]  # called with the bytes that have arrived since the last call


@dataclass(frozen=True)
class ChunkRead:
    """One chunk to read, of the leaf number `row` of its group. bytes: of its elements, without the checksum."""

    group: BufferGroup
    row: int
    key: str
    destinations: tuple[Destination, ...]
    bytes: int
    shape: tuple[int, ...]
    compressed: bool = False

    @property
    def label(self) -> str:
        """The leaf's."""
        return self.group.requests[self.row].leaf.label

    def view(self, destination: Destination) -> Array:
        """The memory that a part of the chunk belongs to; its first dimension is of one leaf."""
        return self.group.buffers[destination.buffer][(slice(self.row, self.row + 1), *destination.inside)]


class Reading(Protocol):
    """Chunks that are being read."""

    def is_done(self) -> bool:
        """Whether `result` would not wait."""

    def result(self) -> None:
        """Wait until each of the chunks is checked (`chunk_checks`) and at its destinations. Raises Suspect naming leaf
        and chunk, Unavailable."""


class ChunkSource(Protocol):
    """Reads chunks of one attempt. Main thread."""

    directory: str  # URL of the attempt's `state/`

    def index(self) -> StoredIndex | None:
        """Key -> the chunk, or where it is, for all of the store; None where nobody has listed its files. Worked out
        once. Raises Damaged, Suspect, Unavailable."""

    def value(self, key: str, label: str) -> bytes:
        """A small value that is no chunk. Raises Damaged naming the leaf `label` if there is none, and as `index`."""

    def begin(self, reads: Iterator[ChunkRead], on_bytes: OnBytes) -> Reading:
        """Begin to read each of the chunks, in any order; holds a bounded number of bytes beside the buffers. May be
        called again before the result of what was begun earlier."""

    def close(self) -> None:
        """Nothing is read any more, whatever has been begun, and no file is open. It may be used again."""


class ChunkFiles(Protocol):
    """The merged store of an attempt as files that can be read in parts. Any number of threads."""

    def index(self) -> StoredIndex | None:
        """Key -> value, or its place; None if the store's tree is one that only TensorStore reads. Raises Suspect
        naming the files that it was read from, Damaged, StorageError."""

    def files_of(self, chunk: Chunk | None) -> list[str]:
        """The files, below the directory, that a value of the index comes from: its own, or those of the tree."""

    def read_into(self, elements: memoryview, place: Location, label: str) -> tuple[int, int]:
        """Read a chunk's elements. Returns the CRC-32C of what was read and the one that the chunk ends with. Raises
        Suspect, StorageError, both beginning with `label`."""

    def read(self, buffer: memoryview, place: Location, label: str) -> None:
        """Read bytes at a place. Raises as `read_into`."""

    def close(self) -> None:
        """Close all files. They may be read again."""


def chunk_reads(groups: Iterable[BufferGroup], source: ChunkSource) -> Iterator[ChunkRead]:
    """Each chunk once, with all its destinations. Raises what `source.value` raises."""
    for group in groups:
        for row, request in enumerate(group.requests):
            leaf, chunk, layout = request.leaf, request.leaf.chunk, group.layout
            if compressed := chunk is None:
                key = zarr_chunks.metadata_key(leaf.name)
                chunk = chunk_shape(source.value(key, leaf.label), leaf, f"{key} in {source.directory}")
                layout = with_chunks(layout, leaf, chunk)
            size = math.prod(chunk or ()) * group.dtype.itemsize
            for suffix, destinations in layout.reads:
                yield ChunkRead(group, row, leaf.name + suffix, destinations, size, chunk or (), compressed)

"""Reading leaves of an attempt's `state/`, onto any mesh, any process count, or into numpy.

On a file system each chunk is read from its data file straight into the buffer that becomes the device array, on a few
threads, and its CRC-32C is checked there; nothing of full size lies between. What accelerators are to have goes through
a ring of bounded size instead (`host_ring`). Small leaves of one form are read,
checked and made into arrays together, from the store's index that holds them. From an object store, the others are read
as objects of the OCDBT store in one bounded window. Compressed chunks take the same ways and are decoded last. An array
that another writer has stored is read through TensorStore's zarr drivers.

Nothing is read but files that the step's manifest lists, and no buffer is given out that reads do not cover.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from orchestrator import gc_pause
from orchestrator.arrays.element_types import numpy_dtype
from orchestrator.arrays.format.tensorstore_specs import report_retries
from orchestrator.arrays.reading.buffers import BufferGroup, grouped, region_of
from orchestrator.arrays.reading.chunk_checks import ChunkChecks, suspecting
from orchestrator.arrays.reading.chunk_source import ChunkSource, OnBytes, Reading, chunk_reads
from orchestrator.arrays.reading.device_arrays import make_arrays, value_without_file
from orchestrator.arrays.reading.external import ExternalArrays
from orchestrator.arrays.reading.host_memory import Arena
from orchestrator.arrays.reading.host_ring import HostRing
from orchestrator.arrays.reading.kvstore import KvStore
from orchestrator.arrays.reading.kvstore_source import KvStoreSource
from orchestrator.arrays.reading.local_source import LocalSource
from orchestrator.arrays.reading.owned_memory import use_owned_memory
from orchestrator.arrays.reading.placed_source import PlacedSource
from orchestrator.arrays.reading.placed_store import Places
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.rules import zarr_chunks
from orchestrator.rules.boxes import whole_box
from orchestrator.rules.chunk_index import StoredFiles
from orchestrator.rules.records import Box, LeafSpec
from orchestrator.storage import local_path


def load(
    directory: str,
    requests: Sequence[ReadRequest],
    on_bytes: OnBytes | None = None,
    stored: StoredFiles | None = None,
    *,
    host_bytes_max: int | None = None,
    places: Places | None = None,
) -> list[Any]:
    """The values of the requested leaves of the `state/` at URL `directory`, in order. Each process reads what it needs
    itself: this waits for no other process. Main thread.

    on_bytes: called with the number of bytes as they arrive, for progress displays. stored: what the manifest lists;
    without it another save's chunk cannot be distinguished from this one's. host_bytes_max: of what goes to
    accelerators, how much is held on the host (`HostRing`). places: where its files are, instead of in `directory`.
    Raises Suspect naming the leaf if something is not as it should be, which proves nothing yet, Unavailable if it
    cannot be read.
    """
    groups = grouped(requests)
    values: list[Any] = [None] * len(requests)
    if sum(len(group.positions) for group in groups) < len(requests):
        values = [None if request.leaf.in_store else value_without_file(request) for request in requests]
    if not groups:
        return values
    reader = _Reader(directory, on_bytes, stored, places)
    try:
        with suspecting(directory):
            if on_cpus := [group for group in groups if not group.for_accelerator]:
                use_owned_memory(on_cpus)
                reader.fill(on_cpus, Arena())
                with gc_pause.paused():
                    make_arrays(on_cpus, values)
            ring = HostRing(host_bytes_max)
            ring.load(reader, [group for group in groups if group.for_accelerator], values)
    finally:
        reader.close()
        report_retries(directory)
    return values


def slabs(
    directory: str,
    leaves: Iterable[LeafSpec],
    slab_bytes: int,
    on_bytes: OnBytes | None = None,
    stored: StoredFiles | None = None,
) -> Iterator[tuple[LeafSpec, Box, np.ndarray[Any, Any]]]:
    """Whole arrays in pieces, checked as `load` does: (leaf, region, its elements as stored). In the order of `leaves`,
    and in C order within each: the pieces laid end to end are the array. Holds one piece of at most `slab_bytes` (one
    element at least) at a time, beside the window of reads. Leaves that no file holds are left out. Raises as `load`.
    """
    reader = _Reader(directory, on_bytes, stored)
    for leaf in leaves:
        if leaf.in_store:
            dtype = numpy_dtype(leaf.stored_dtype or leaf.dtype)
            piece = zarr_chunks.chunk_shape(leaf.file_shape, dtype.itemsize, slab_bytes)
            for box in zarr_chunks.cut(whole_box(leaf.file_shape), piece):
                group = region_of(leaf, box)
                with suspecting(directory):
                    reader.fill([group], Arena())
                yield leaf, box, group.buffers[0][0]


class _Reader:
    """Fills the buffers of groups from one directory."""

    def __init__(
        self, directory: str, on_bytes: OnBytes | None, stored: StoredFiles | None, places: Places | None = None
    ) -> None:
        kvstore = KvStore(directory)
        self._on_bytes: OnBytes = on_bytes or (lambda read_bytes: None)
        self._source = _chunk_source(directory, kvstore, stored, places)
        self._checks = ChunkChecks(directory, stored.chunks if stored else {})
        self._external = ExternalArrays(directory, kvstore, stored)

    def fill(self, groups: Sequence[BufferGroup], arena: Arena) -> None:
        """Read everything that belongs into the groups' buffers, which are `arena`'s unless they have some already.
        Raises what Reading raises, Damaged, MemoryError."""
        try:
            self.begin(groups, arena).result()
        finally:
            self.close()

    def begin(self, groups: Sequence[BufferGroup], arena: Arena) -> Reading:
        """As `fill`, without waiting for chunks that are in files of their own store."""
        for group in groups:
            group.allocate(arena)
        own = [group for group in groups if group.leaf.external is None]
        index = self._source.index() if own else None
        rest = [group for group in own if index is None or not self._fill_from(index, group)]
        begun = self._source.begin(chunk_reads(rest, self._source), self._on_bytes)
        for group in groups:
            if group.leaf.external is not None:
                self._external.fill(group, self._on_bytes)
        return begun

    def close(self) -> None:
        """Nothing is read any more, whatever was begun."""
        self._source.close()

    def _fill_from(self, index: StoredIndex, group: BufferGroup) -> bool:
        if not self._checks.fill_from_index(group, index):
            return False
        self._on_bytes(group.chunk_bytes * len(group.requests) * len(group.layout.reads))
        return True


def _chunk_source(directory: str, kvstore: KvStore, stored: StoredFiles | None, places: Places | None) -> ChunkSource:
    """The chunks of the attempt's own array store in the `state/` at URL `directory`."""
    if places is not None and stored is not None:
        return PlacedSource(directory, stored, places)
    if local_path(directory) is not None:
        return LocalSource(directory, stored)
    return KvStoreSource(directory, kvstore, stored)

"""External arrays: those that plain Orbax had stored before the run was adopted, read through TensorStore's zarr
drivers.

A chunk of theirs is decoded whole, into memory of TensorStore's own; how large it may be is checked before.
"""

from __future__ import annotations

import math
from typing import Any

import tensorstore as ts

from orchestrator.arrays.element_types import numpy_dtype
from orchestrator.arrays.format.tensorstore_specs import external_spec
from orchestrator.arrays.reading.buffers import BufferGroup
from orchestrator.arrays.reading.chunk_source import OnBytes
from orchestrator.arrays.reading.host_memory import reserve
from orchestrator.arrays.reading.kvstore import KvStore
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import StoredFiles
from orchestrator.rules.records import ExternalArray, LeafSpec
from orchestrator.storage import local_path

_ODD_CHUNK_BYTES = 64 << 20  # a chunk may be larger than its array, up to this


class ExternalArrays:
    """The external arrays of the `state/` at URL `directory`. stored: what the manifest lists; None: nobody knows."""

    def __init__(self, directory: str, kvstore: KvStore, stored: StoredFiles | None) -> None:
        self._directory, self._kvstore, self._stored = directory.rstrip("/"), kvstore, stored
        self._checked: set[str] = set()  # items

    def fill(self, group: BufferGroup, on_bytes: OnBytes) -> None:
        """Read the regions of each leaf into the group's buffers. Raises Damaged, MemoryError, Suspect, Unavailable."""
        self._kvstore.inspect()
        for row, request in enumerate(group.requests):
            array = self._opened(request.leaf)
            for box, buffers in zip(group.layout.boxes, group.buffers, strict=True):
                buffer = buffers[row, ...]
                part = array[tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))]
                buffer[...] = self._kvstore.result(request.leaf.label, part.read())
                on_bytes(buffer.nbytes)

    def _opened(self, leaf: LeafSpec) -> Any:
        assert leaf.external is not None
        self._check_item(leaf.external)
        spec = external_spec(f"{self._directory}/{leaf.external.item}", leaf.external)
        array = self._kvstore.result(leaf.label, ts.open(spec, open=True, read=True, context=self._kvstore.context))
        dtype = leaf.stored_dtype or leaf.dtype
        if (tuple(array.shape), array.dtype.name) != (leaf.file_shape, dtype):
            there = f"{array.dtype.name}{list(array.shape)}"
            raise Damaged(f"{leaf.label}: the file holds {there}, the tree spec {dtype}{list(leaf.file_shape)}")
        item_bytes = numpy_dtype(dtype).itemsize
        chunk_bytes = math.prod(array.chunk_layout.read_chunk.shape or ()) * item_bytes
        if chunk_bytes > max(_ODD_CHUNK_BYTES, math.prod(leaf.file_shape) * item_bytes):
            raise Damaged(f"{leaf.label}{list(array.shape)}: chunks of {chunk_bytes} bytes, more than the array has")
        reserve(chunk_bytes)
        return array

    def _check_item(self, external: ExternalArray) -> None:
        """Whether the item's array store, on a file system, leads to files of this step only, as far as that can be
        seen: TensorStore alone reads trees with compressed nodes. Once for each item. Raises Suspect, Unavailable."""
        if not external.ocdbt or external.item in self._checked or self._stored is None:
            return
        self._checked.add(external.item)
        path = local_path(self._directory)
        if path is not None:
            LocalStore(f"{path}/{external.item}".rstrip("/"), self._stored.below(external.item)).index()

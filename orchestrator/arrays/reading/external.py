"""Arrays that another Orbax has written, before the run was adopted: read through TensorStore's zarr drivers.

A chunk of theirs is decoded whole, into memory of TensorStore's own; how large it may be is looked at before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from orchestrator.arrays.format.tensorstore_specs import external_spec
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.reading.placing import reserve
from orchestrator.arrays.tree import numpy_dtype
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Stored
from orchestrator.rules.records import Box, ExternalArray, LeafSpec

_ODD_CHUNK_BYTES = 64 << 20  # a chunk may be larger than its array, up to this


class External:
    """The external arrays of the `state/` at URL `directory`. `result`: waits for TensorStore, and says what went wrong
    with a leaf's read."""

    def __init__(
        self, directory: str, context: ts.Context, stored: Stored | None, result: Callable[[str, Any], Any]
    ) -> None:
        self._directory, self._context, self._stored, self._result = directory.rstrip("/"), context, stored, result
        self._checked: set[str] = set()  # items

    def read(
        self,
        leaf: LeafSpec,
        boxes: Sequence[Box],
        buffers: Sequence[np.ndarray[Any, Any]],
        on_bytes: Callable[[int], None],
    ) -> None:
        """Regions of an array into buffers of their shapes. Raises Damaged, MemoryError and what `result` raises."""
        assert leaf.external is not None
        self._check_item(leaf.external)
        spec = external_spec(f"{self._directory}/{leaf.external.item}", leaf.external)
        array = self._result(leaf.label, ts.open(spec, open=True, read=True, context=self._context))
        self._check_form(leaf, array)
        for box, buffer in zip(boxes, buffers, strict=True):
            part = array[tuple(slice(start, stop) for start, stop in zip(box.start, box.stop, strict=True))]
            buffer[...] = self._result(leaf.label, part.read())
            on_bytes(buffer.nbytes)

    def _check_form(self, leaf: LeafSpec, array: Any) -> None:
        dtype = leaf.stored_dtype or leaf.dtype
        if (tuple(array.shape), array.dtype.name) != (leaf.file_shape, dtype):
            there = f"{array.dtype.name}{list(array.shape)}"
            raise Damaged(f"{leaf.label}: the file holds {there}, the tree spec {dtype}{list(leaf.file_shape)}")
        item_bytes = numpy_dtype(dtype).itemsize
        chunk_bytes = math.prod(array.chunk_layout.read_chunk.shape or ()) * item_bytes
        if chunk_bytes > max(_ODD_CHUNK_BYTES, math.prod(leaf.file_shape) * item_bytes):
            raise Damaged(f"{leaf.label}{list(array.shape)}: chunks of {chunk_bytes} bytes, more than the array has")
        reserve(chunk_bytes)

    def _check_item(self, external: ExternalArray) -> None:
        """Whether the item's array store, on a file system, leads to files of this step only, as far as it can be told:
        TensorStore alone reads trees with compressed nodes. Once for each item."""
        if not external.ocdbt or external.item in self._checked or self._stored is None:
            return
        self._checked.add(external.item)
        if not self._directory.startswith("file://"):
            return
        stored = self._stored.below(external.item)
        local = LocalStore(f"{self._directory.removeprefix('file://')}/{external.item}".rstrip("/"), stored)
        try:
            local.places()
        finally:
            local.close()

"""What a store's tree says of its chunks, as columns: thousands of small ones are looked up and taken out at once.

May not do: read anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from orchestrator.arrays.format.ocdbt import Entries
from orchestrator.rules.chunk_index import Chunk

_Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class StoredIndex(Mapping[str, Chunk]):
    """Key -> the chunk itself, or its place, of all leaves of a tree, whose keys are UTF-8. Of a key that is there
    twice, one."""

    def __init__(self, leaves: Sequence[Entries]) -> None:
        self._leaves = leaves
        sizes = [len(leaf) for leaf in leaves]
        self._first = [0, *itertools.accumulate(sizes)][: len(leaves)]

    def __getitem__(self, key: str) -> Chunk:
        row = self._rows[key]
        leaf = 0 if len(self._leaves) == 1 else int(np.searchsorted(self._first, row, side="right")) - 1
        return self._leaves[leaf].value(row - self._first[leaf])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def inline(self, keys: Sequence[str], size: int) -> _Bytes | None:
        """The chunks themselves, a row each; None unless all are here and of `size` bytes."""
        rows = np.fromiter(map(self._rows.get, keys, itertools.repeat(-1)), np.int64, len(keys))
        if not len(rows) or int(np.min(rows)) < 0:
            return None
        starts, sizes, everything = self._inline
        if (sizes[rows] != size).any():
            return None
        found: _Bytes = everything[starts[rows][:, None] + np.arange(size)]
        return found

    @cached_property
    def _rows(self) -> Mapping[str, int]:
        if len(self._leaves) == 1:
            return self._leaves[0].table.rows
        found: dict[str, int] = {}
        for first, leaf in zip(self._first, self._leaves, strict=True):
            found |= zip(leaf.table.rows, range(first, first + len(leaf)), strict=True)
        return found

    @cached_property
    def _inline(self) -> tuple[Any, Any, _Bytes]:
        """By row, where a chunk that is here begins among all of them, and its bytes (-1: it is in a file)."""
        before = [0, *itertools.accumulate(len(leaf.inline) for leaf in self._leaves)]
        starts = [leaf.offsets + first for leaf, first in zip(self._leaves, before, strict=False)]
        sizes = [np.where(leaf.files < 0, leaf.sizes, -1) for leaf in self._leaves]
        everything = b"".join([leaf.inline for leaf in self._leaves])
        return np.concatenate(starts), np.concatenate(sizes), np.frombuffer(everything, np.uint8)

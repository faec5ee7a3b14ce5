"""What a tree's arrays come to: how many chunks and bytes, counted once for all steps that have the tree. Pure."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.kept import kept
from orchestrator.rules.records import LeafSpec


class Sums(NamedTuple):
    """Of a tree. chunks, raw_bytes: of the arrays whose chunks it has. values: of how many numbers the store has a
    chunk, for Orbax's readers. not_cut: arrays whose chunks it does not have, and their bytes. ours: one in an array
    store of ours."""

    chunks: int
    raw_bytes: int
    values: int
    not_cut: list[tuple[LeafSpec, int]]
    ours: LeafSpec | None


@kept
def sums(leaves: tuple[LeafSpec, ...]) -> Sums:
    count = raw_bytes = values = 0
    not_cut: list[tuple[LeafSpec, int]] = []
    ours: LeafSpec | None = None
    sizes: dict[Any, tuple[int, int]] = {}  # bytes and chunks: a state has many leaves of few forms
    for leaf in leaves:
        if not leaf.in_store:
            values += leaf.number != ""
            continue
        form = (leaf.file_shape, leaf.stored_dtype or leaf.dtype, leaf.chunk)
        if form not in sizes:
            elements = math.prod(form[0])
            sizes[form] = elements * ITEM_BYTES[form[1]], elements // math.prod(leaf.chunk or ())
        size, chunks = sizes[form]
        if leaf.chunk is None:
            not_cut.append((leaf, size))
        else:
            count += chunks
            raw_bytes += size
        if ours is None and not leaf.external:
            ours = leaf
    return Sums(count, raw_bytes, values, not_cut, ours)

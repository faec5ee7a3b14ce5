"""Which chunks fill the buffers that arrays are read into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import orchestrator as oc
from orchestrator import arrays
from orchestrator.arrays import ReadRequest
from orchestrator.arrays.reading.buffers import grouped, region_of
from orchestrator.rules.boxes import shape_of
from orchestrator.rules.records import Box, LeafSpec


@pytest.mark.parametrize(
    ("shape", "chunk"), [((4, 6), (-2, 6)), ((4, 6), (-1, -6)), ((6,), (-6,)), ((512, 1024), (-1, 1024))], ids=str
)
def test_no_memory_is_given_out_that_nothing_is_read_into(shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    """Behind what validates records: whatever the chunks are, they cover the buffers."""
    leaf = LeafSpec(path=("w",), kind="numpy", shape=shape, dtype="float32", chunk=chunk)
    with pytest.raises(oc.Damaged, match="cover 0 elements of the region"):
        grouped([ReadRequest(leaf)])


@pytest.mark.parametrize("chunk", [(2, 6), (1, 1), (4, 3), (4, 6)], ids=str)
def test_chunks_that_tile_an_array_cover_every_region_of_it(chunk: tuple[int, ...]) -> None:
    leaf = LeafSpec(path=("w",), kind="numpy", shape=(4, 6), dtype="float32", chunk=chunk)
    for box in (Box((0, 0), (4, 6)), Box((1, 2), (3, 5)), Box((0, 0), (0, 6))):
        layout = region_of(leaf, box).layout
        covered = np.zeros(shape_of(box), np.int64)
        for _, destinations in layout.reads:
            for destination in destinations:
                covered[destination.inside] += 1
        assert (covered == 1).all()


def test_memory_that_is_not_to_be_had_says_so_and_is_no_damage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An array of four exabytes, of which nobody has compared anything."""
    leaf = LeafSpec(path=("w",), kind="numpy", shape=(2**60,), dtype="float32", chunk=(2**60,))
    with pytest.raises(oc.Unavailable, match="no memory left to read arrays: 4611686018427387904 bytes"):
        arrays.load(f"file://{tmp_path}", [arrays.ReadRequest(leaf)])

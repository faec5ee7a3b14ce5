"""Both ways to read chunks, from files and through TensorStore's key-value stores, against one contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orchestrator as oc
from orchestrator.arrays.reading.buffers import BufferGroup, grouped
from orchestrator.arrays.reading.chunk_source import ChunkSource, chunk_reads
from orchestrator.arrays.reading.host_memory import Arena
from orchestrator.arrays.reading.kvstore import KvStore
from orchestrator.arrays.reading.kvstore_source import KvStoreSource
from orchestrator.arrays.reading.local_source import LocalSource
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.errors import Damaged, Suspect
from orchestrator.rules import chunk_index, keys
from orchestrator.rules.chunk_index import StoredFiles
from orchestrator.rules.records import LeafSpec
from tests.support.runs import now, store_of

STATE: dict[str, Any] = {
    "large": np.arange(3 << 20, dtype=np.float32).reshape(3, -1),
    "small": np.arange(6, dtype=np.int16),
}
SOURCES: dict[str, Callable[[str, StoredFiles | None], ChunkSource]] = {
    "files": LocalSource,
    "key-value store": lambda directory, stored: KvStoreSource(directory, KvStore(directory), stored),
}


@pytest.fixture(params=[False, True], ids=["plain", "compressed"])
def attempt(root: Path, request: pytest.FixtureRequest) -> tuple[str, StoredFiles, list[LeafSpec]]:
    """Of a saved step: URL of its `state/`, what its manifest lists, its leaves."""
    with oc.Agent(root, options=now(compression=request.param)) as agent:
        agent.save(1, STATE)
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    manifest = store.step(live).manifest
    leaves = list(store.step(live).intent.tree.leaves)
    return f"{store.url}/{live.id.prefix}{keys.STATE}", chunk_index.stored(manifest), leaves


def filled(source: ChunkSource, leaves: list[LeafSpec]) -> tuple[list[BufferGroup], int]:
    """Groups with the source's chunks in their buffers, and how many bytes it has reported."""
    groups = grouped([ReadRequest(leaf) for leaf in leaves])
    for group in groups:
        group.allocate(Arena())
    read: list[int] = []
    try:
        source.begin(chunk_reads(groups, source), read.append).result()
    finally:
        source.close()
    return groups, sum(read)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_chunk_gets_to_its_place_and_is_counted(attempt: Any, make: Any) -> None:
    directory, stored, leaves = attempt
    groups, read_bytes = filled(make(directory, stored), leaves)
    for group in groups:
        assert np.array_equal(group.buffers[0][0], STATE[group.leaf.name])
    assert read_bytes == sum(array.nbytes for array in STATE.values())


def test_both_have_the_same_index_and_one_without_a_manifest_may_have_none(attempt: Any) -> None:
    directory, stored, leaves = attempt
    indices = [make(directory, stored).index() for make in SOURCES.values()]
    assert indices[0] == indices[1]
    unlisted = SOURCES["key-value store"](directory, None)
    assert unlisted.index() is None
    assert np.array_equal(filled(unlisted, leaves)[0][0].buffers[0][0], STATE[leaves[0].name])


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_a_chunk_of_another_save_is_suspected_by_leaf_and_key(attempt: Any, make: Any) -> None:
    directory, stored, leaves = attempt
    other = StoredFiles({**stored.chunks, "small/c/0": "00000000"}, stored.files)
    with pytest.raises(Suspect, match=r"small: chunk small/c/0 .* belongs to another save") as caught:
        filled(make(directory, other), leaves)
    assert caught.value.chunks == ("small/c/0",)


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_what_is_not_there_is_named(attempt: Any, make: Any) -> None:
    directory, stored, _ = attempt
    source = make(directory, stored)
    absent = LeafSpec(path=("absent",), kind="numpy", shape=(4,), dtype="int16", chunk=(4,))
    with pytest.raises(Suspect, match="absent: chunk absent/c/0 is missing in "):
        filled(source, [absent])
    with pytest.raises(Damaged, match=r"absent: absent/zarr\.json is missing in "):
        source.value("absent/zarr.json", "absent")

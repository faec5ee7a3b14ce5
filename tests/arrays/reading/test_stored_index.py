"""A store's tree as columns: one chunk at a time, or thousands at once."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.arrays.reading.stored_tree import walk
from orchestrator.rules.chunk_index import Chunk


def index_of(entries: dict[str, Chunk]) -> StoredIndex:
    keys = sorted(entries)
    nodes, manifest = ocdbt.encode(
        [key.encode() for key in keys], [entries[key] for key in keys], "nodes", 0, bytes(16), 1
    )
    root = ocdbt.decode_manifest(manifest, "manifest")
    assert root is not None
    return walk(root, lambda place: nodes[place[1] : place[1] + place[2]], "state", None)


def entries_of(count: int) -> dict[str, Chunk]:
    """Every third in a file, the others of one size."""
    return {
        f"w{number:06d}/c/0": ("d/x", number * 30, 30) if number % 3 == 0 else f"{number:020d}".encode()
        for number in range(count)
    }


@pytest.mark.parametrize("count", [5, 40_000])  # one leaf; several below one root
def test_every_key_has_its_own_chunk_however_it_is_asked_for(count: int) -> None:
    entries = entries_of(count)
    index = index_of(entries)
    assert len(index) == count and sorted(index) == sorted(entries)
    some = list(entries)[:: max(1, count // 500)]
    assert {key: index[key] for key in some} == {key: entries[key] for key in some}
    assert index.get("w/c/0") is None and "w000001/c/0" in index
    inside = [key for key in list(entries)[::-7] if isinstance(entries[key], bytes)]
    found = index.inline(inside, 20)
    assert found is not None and [row.tobytes() for row in found] == [entries[key] for key in inside]


@pytest.mark.parametrize("odd", ["missing", "in a file", "longer"])
def test_many_are_given_at_once_only_if_all_are_there_and_of_the_size(odd: str) -> None:
    entries = entries_of(9) | {"longer": b"1" * 21}
    index = index_of(entries)
    good = ["w000001/c/0", "w000002/c/0"]
    assert index.inline(good, 20) is not None
    assert index.inline([*good, "w000003/c/0" if odd == "in a file" else odd], 20) is None
    assert index.inline(["w000003/c/0"], 30) is None  # of the size, and in a file


def test_two_trees_with_the_same_keys_share_them_and_nothing_else() -> None:
    first = index_of({"a": b"1", "b": b"2"})
    second = index_of({"a": b"3", "b": b"4"})
    assert first._leaves[0].table is second._leaves[0].table
    assert dict(first) == {"a": b"1", "b": b"2"} and dict(second) == {"a": b"3", "b": b"4"}
    assert dict(index_of({"a": b"5", "c": b"6"})) == {"a": b"5", "c": b"6"}


def test_an_empty_index_has_nothing() -> None:
    assert dict(StoredIndex(())) == {} and StoredIndex(()).inline([], 1) is None
    assert np.array_equal(index_of({"a": b"12"}).inline(["a"], 2), [[49, 50]])  # type: ignore[arg-type]

"""What receipts say is in the store: every chunk once, each inside a file that its own receipt promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.tree import flatten
from orchestrator.arrays.writing import merged_tree
from orchestrator.arrays.writing.write_plan import KeyOrder
from orchestrator.errors import Damaged
from orchestrator.rules import chunk_index
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import FileEntry, Place
from tests.support.builders import receipt

FILES = (
    FileEntry(path="process/00000.bin", bytes=9, crc32c="00000000"),
    FileEntry(path="state/ocdbt.process_0/d/a", bytes=100, crc32c="00000000"),
)


def place(**changed: Any) -> Place:
    return Place(**{"file": 1, "offset": 0, "bytes": 100, "crc32c": "0a0b0c0d", **changed})


def test_chunks_are_gathered_from_all_receipts_with_their_checksums() -> None:
    first = receipt(0, files=FILES, places={"w/c/0": place()})
    second = receipt(1, small={"b/c/0": b"\1\2\3\4\x0d\x0c\x0b\x0a"})
    back = [decode(encode(one), type(one), "") for one in (first, second)]  # as the coordinator gets them
    assert chunk_index.entries(back) == {
        "w/c/0": ("ocdbt.process_0/d/a", 0, 100),
        "b/c/0": b"\1\2\3\4\x0d\x0c\x0b\x0a",
    }
    assert chunk_index.checksums(back) == {"w/c/0": "0a0b0c0d", "b/c/0": "0a0b0c0d"}


@pytest.mark.parametrize(
    "changed", [{"file": 2}, {"file": -1}, {"file": 0}, {"offset": -1}, {"offset": 1}, {"bytes": 101}, {"bytes": 4}]
)
def test_a_place_outside_the_files_that_the_receipt_promises_is_rejected(changed: dict[str, int]) -> None:
    with pytest.raises(Damaged, match=r"receipt of process 0 \(host-0\): chunk w/c/0 is at"):
        chunk_index.entries([receipt(0, files=FILES, places={"w/c/0": place(**changed)})])


@pytest.mark.parametrize("again", [{"places": {"w/c/0": place()}}, {"small": {"w/c/0": b"12345"}}])
def test_a_chunk_of_two_processes_is_rejected(again: dict[str, Any]) -> None:
    first = receipt(0, files=FILES, places={"w/c/0": place()})
    with pytest.raises(Damaged, match=r"chunk w/c/0: process 1 \(host-1\) and another one have written it"):
        dict(chunk_index.entries([first, receipt(1, files=FILES, **again)]))


def test_a_tree_is_not_made_where_two_processes_have_written_a_chunk_instead_of_two_chunks() -> None:
    receipts = [receipt(number, files=FILES, places={"w/c/0": place()}) for number in range(2)]
    order = KeyOrder.of(["w/c/0", "w/c/1"])
    with pytest.raises(Damaged, match=r"chunk w/c/0: process 1 \(host-1\) and another one have written it"):
        merged_tree.encoded(order, {}, chunk_index.entries(receipts), "d/0")


def test_a_tree_says_where_each_chunk_is_in_the_order_of_keys() -> None:
    first = receipt(0, files=FILES, places={"w/c/1": place(offset=20, bytes=30)}, small={"b/c/0": b"inline"})
    second = receipt(1, files=FILES[1:], places={"w/c/0": place(file=0, bytes=9)}, small={"x/c/0": b"other"})
    entries, metadata = chunk_index.entries([first, second]), {"w/zarr.json": b"{}"}
    order = KeyOrder.of([*entries, *metadata])
    nodes, manifest = merged_tree.encoded(order, metadata, entries, "d/0") or (b"", b"")
    root = ocdbt.decode_manifest(manifest, "")
    assert root is not None
    found, _ = ocdbt.decode_node(nodes, root, b"", "")
    assert found and list(found) == sorted((key.encode(), value) for key, value in {**entries, **metadata}.items())


@pytest.mark.parametrize("lost", [["w/c/0"], ["b/c/0"], []])
def test_a_tree_is_written_of_exactly_the_arrays_chunks_or_not_at_all(tmp_path: Path, lost: list[str]) -> None:
    pending = ArrayWriter(ArrayOptions(), 0).stage(
        f"file://{tmp_path}/state", flatten({"w": jnp.ones(3), "b": jnp.ones(2)})
    )
    pending.finish(30)
    small = {key: body for key, body in pending.small.items() if key not in lost}
    entries = chunk_index.entries([receipt(0, small=small | ({} if lost else {"other/c/0": b"12345"}))])
    said = rf"missing \['{lost[0]}'\]" if lost else r"1 of no array: missing \[\], unknown \['other/c/0'\]"
    with pytest.raises(Damaged, match=said):
        pending.merge(entries)
    assert not (tmp_path / "state" / "manifest.ocdbt").exists()

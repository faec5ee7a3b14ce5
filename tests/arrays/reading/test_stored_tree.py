"""Array stores whose trees are forged: what is read, and what is never given out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pytest

from orchestrator import arrays
from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.reading.stored_tree import ObjectTree
from orchestrator.errors import Damaged, Suspect
from orchestrator.rules.chunk_index import StoredFiles
from orchestrator.rules.records import LeafSpec

NODE, DATA = "d/node", "d/data"


def summary(size: int, first: bytes = b"a", offset: int = 0) -> ocdbt._Summary:
    return ocdbt._Summary(first, (NODE, offset, size), 1, size, 1)


def store(directory: Path, nodes: bytes, root: ocdbt._Summary, height: int = 0) -> Callable[[], Any]:
    (directory / "d").mkdir()
    (directory / NODE).write_bytes(nodes)
    (directory / DATA).write_bytes(bytes(100))
    (directory / ocdbt.MANIFEST).write_bytes(ocdbt._manifest(root, height, bytes(16), 1))
    files = {name: (directory / name).stat().st_size for name in (NODE, DATA, ocdbt.MANIFEST)}
    return LocalStore(str(directory), StoredFiles({}, files)).index


def leaf_node(*entries: tuple[bytes, Any]) -> bytes:
    keys, values = zip(*entries, strict=True)
    paths = [*{value[0]: None for value in values if isinstance(value, tuple)}]
    places = [value if isinstance(value, tuple) else ("", 0, len(value)) for value in values]
    columns = ocdbt.Columns(
        [path.encode() for path in paths],
        np.array([paths.index(path) if path else -1 for path, _, _ in places]),
        np.array([offset for _, offset, _ in places], np.uint64),
        np.array([size for _, _, size in places]),
        [value for value in values if isinstance(value, bytes)],
    )
    return ocdbt._leaf(ocdbt._keys(keys), columns)


def resigned(node: bytes, change: Callable[[bytearray], None]) -> bytes:
    body = bytearray(node)
    change(body)
    body[4:12] = len(body).to_bytes(8, "little")
    body[-4:] = crc32c.crc32c(bytes(body[:-4])).to_bytes(4, "little")
    return bytes(body)


def rewritten(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(body: bytearray) -> None:
        assert body.count(old) == 1
        at = body.index(old)
        body[at : at + len(old)] = new

    return change


LEAF = leaf_node((b"aa/c", b"1234x"), (b"ab/c", (DATA, 10, 20)))


def inner(*children: ocdbt._Summary) -> bytes:
    return ocdbt._interior(children)


def test_a_tree_is_read_as_far_as_its_manifest_goes(tmp_path: Path) -> None:
    assert store(tmp_path, LEAF, summary(len(LEAF)))() == {"aa/c": b"1234x", "ab/c": (DATA, 10, 20)}


def test_an_interior_node_leads_to_its_children(tmp_path: Path) -> None:
    above = inner(summary(len(LEAF)))
    places = store(tmp_path, LEAF + above, summary(len(above), offset=len(LEAF)), height=1)()
    assert places.keys() == {"aa/c", "ab/c"}


_SELF = len(inner(summary(100)))
TREES: dict[str, tuple[bytes, ocdbt._Summary, int, str]] = {
    "a root that is its own child": (inner(summary(_SELF)), summary(_SELF), 1, "are there twice"),
    "a root of height 255 that is its own child": (inner(summary(_SELF)), summary(_SELF), 255, "not of height 255"),
    "a child as high as its parent": (
        inner(summary(100)) + inner(summary(_SELF)),
        summary(_SELF, offset=_SELF),
        1,
        "not of height 0",
    ),
    "a child twice": (
        LEAF + inner(summary(len(LEAF)), summary(len(LEAF), b"b")),
        summary(len(inner(summary(len(LEAF)), summary(len(LEAF), b"b"))), offset=len(LEAF)),
        1,
        "are there twice",
    ),
    "a key in two nodes": (
        LEAF + LEAF + inner(summary(len(LEAF)), summary(len(LEAF), b"b", len(LEAF))),
        summary(len(inner(summary(len(LEAF)), summary(len(LEAF), b"b", len(LEAF)))), offset=2 * len(LEAF)),
        1,
        "are there twice",
    ),
    "a leaf that says it is none": (LEAF, summary(len(LEAF)), 3, "not of height 3"),
    "a node beyond its file": (LEAF, summary(len(LEAF), offset=50), 0, "a node of"),
    "a node of a terabyte": (LEAF, summary(1 << 40), 0, "a node of 1099511627776 bytes"),
    "a node at the end of numbers": (LEAF, summary(len(LEAF), offset=2**63), 0, "a node of"),
}


@pytest.mark.parametrize("case", TREES.values(), ids=TREES)
def test_what_is_no_tree_is_damage(tmp_path: Path, case: tuple[bytes, ocdbt._Summary, int, str]) -> None:
    nodes, root, height, said = case
    with pytest.raises(Suspect, match=said):
        store(tmp_path, nodes, root, height)()


BAD_NODES: dict[str, bytes] = {
    "keys out of order": leaf_node((b"b", b"1"), (b"a", b"2")),
    "a key twice": leaf_node((b"a", b"1"), (b"a", b"2")),
    "a key that is not UTF-8": leaf_node((b"\xff", b"1")),
    "data in a file that is not listed": leaf_node((b"a", ("d/stray", 0, 4))),
    "data beyond its file": leaf_node((b"a", (DATA, 90, 20))),
    "data at the end of numbers": leaf_node((b"a", (DATA, 2**64 - 10, 20))),
    "a value of a third kind": resigned(
        leaf_node((b"abc", (DATA, 10, 20))), rewritten(b"abc\x14\1\0\x0a", b"abc\x14\2\0\0\x0a\x0a")
    ),
    "a number of eleven bytes": resigned(
        leaf_node((b"ab", b""), (b"ac", b"")), rewritten(b"abc\0\0\0\0", b"abc" + b"\x80" * 10 + b"\0\0\0\0")
    ),
    "a shared beginning that is not there": resigned(
        leaf_node((b"ab", b"1"), (b"ac", b"2")), rewritten(b"\2\1\2\1abc", b"\2\7\2\1abc")
    ),
    "more entries than bytes": resigned(
        leaf_node((b"abc", b"1234")), rewritten(b"\0\1\3abc", b"\0\xff\xff\xff\xff\x7f\3abc")
    ),
    "nothing at all": resigned(leaf_node((b"abc", b"1234")), lambda body: body.__delitem__(slice(14, -4))),
    "no entries": resigned(leaf_node((b"abc", b"1234")), rewritten(b"\0\1\3abc\4\x001234", b"\0\0")),
}


@pytest.mark.parametrize("node", BAD_NODES.values(), ids=BAD_NODES)
def test_what_is_no_node_is_damage(tmp_path: Path, node: bytes) -> None:
    with pytest.raises(Suspect):
        store(tmp_path, node, summary(len(node)))()


def test_a_compressed_tree_is_none_of_ours(tmp_path: Path) -> None:
    node = resigned(LEAF, lambda body: body.__setitem__(13, 1))
    places = store(tmp_path, node, summary(len(node)))
    assert places() is None  # TensorStore could read it
    leaf = LeafSpec(path=("aa",), kind="numpy", shape=(1,), dtype="int8", chunk=(1,))
    with pytest.raises(Suspect, match="tree is compressed or in parts; none of ours is"):
        arrays.load(f"file://{tmp_path}", [arrays.ReadRequest(leaf)])


# In a bucket.


def objects(nodes: bytes, root: ocdbt._Summary, height: int = 0) -> dict[str, bytes]:
    return {NODE: nodes, DATA: bytes(100), ocdbt.MANIFEST: ocdbt._manifest(root, height, bytes(16), 1)}


def tree_of(stored: dict[str, bytes]) -> ObjectTree:
    sizes = {name: len(body) for name, body in stored.items()}
    return ObjectTree("gs://bucket/state/", StoredFiles({}, sizes), stored.get)


def test_a_tree_in_a_bucket_is_read_as_one_on_a_disk() -> None:
    places = tree_of(objects(LEAF, summary(len(LEAF)))).index()
    assert places == {"aa/c": b"1234x", "ab/c": (DATA, 10, 20)}


@pytest.mark.parametrize("case", TREES.values(), ids=TREES)
def test_what_is_no_tree_in_a_bucket_is_damage(case: tuple[bytes, ocdbt._Summary, int, str]) -> None:
    nodes, root, height, said = case
    with pytest.raises(Damaged, match=said):
        tree_of(objects(nodes, root, height)).index()


@pytest.mark.parametrize("node", BAD_NODES.values(), ids=BAD_NODES)
def test_what_is_no_node_in_a_bucket_is_damage(node: bytes) -> None:
    with pytest.raises(Damaged):
        tree_of(objects(node, summary(len(node)))).index()


@pytest.mark.parametrize(
    ("change", "listed", "said"),
    [
        ({NODE: None}, {}, "d/node: is missing, the manifest says"),
        ({}, {NODE: 7}, "d/node: has .* bytes, the manifest says 7"),
        ({}, {NODE: 1 << 40}, "nodes in an object of 1099511627776 bytes; .* not read"),
        ({}, {NODE: None}, "d/node: is led to, and the step's manifest does not list it; not read"),
        ({ocdbt.MANIFEST: None}, {}, "manifest.ocdbt: is missing"),
    ],
)
def test_no_object_is_read_that_is_not_as_the_manifest_lists_it(
    change: dict[str, None], listed: dict[str, Any], said: str
) -> None:
    stored = objects(LEAF, summary(len(LEAF)))
    sizes = {name: len(body) for name, body in stored.items()} | listed
    there = {name: body for name, body in stored.items() if name not in change}
    tree = ObjectTree(
        "gs://bucket/state",
        StoredFiles({}, {name: size for name, size in sizes.items() if size is not None}),
        there.get,
    )
    with pytest.raises(Damaged, match=said):
        tree.index()


def test_a_compressed_tree_in_a_bucket_is_decoded_by_nobody() -> None:
    node = resigned(LEAF, lambda body: body.__setitem__(13, 1))
    with pytest.raises(ocdbt.Unsupported):
        tree_of(objects(node, summary(len(node)))).index()

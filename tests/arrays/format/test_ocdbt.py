"""OCDBT stores of ours are read by TensorStore, and TensorStore's by us; damage in them is noticed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import crc32c
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.errors import Suspect
from orchestrator.rules import zarr_chunks
from orchestrator.rules.chunk_index import Chunk

DATA = bytes(range(256)) * 400
CONTEXT = ts.Context()  # stores copy ranges to each other only within one


def put(directory: Path, entries: list[tuple[bytes, Chunk]]) -> None:
    """A store of ours: values in `d/data`, then the tree."""
    nodes, manifest = ocdbt.encode(
        [key for key, _ in entries],
        [value for _, value in entries],
        "d/data",
        len(DATA),
        os.urandom(16),
        1_700_000_000_000_000_000,
    )
    (directory / "d").mkdir(parents=True, exist_ok=True)
    (directory / "d" / "data").write_bytes(DATA + nodes)
    (directory / ocdbt.MANIFEST).write_bytes(manifest)


def opened(directory: Path, **options: Any) -> Any:
    spec = {"driver": "ocdbt", "base": f"file://{directory}/", **options}
    return ts.KvStore.open(spec, context=CONTEXT).result()


def some_entries(count: int) -> list[tuple[bytes, Chunk]]:
    def value(index: int) -> Chunk:
        return b"inline %d" % index if index % 3 else ("d/data", index % 1000, 1 + index % 300)

    return sorted((f"layer_{index}/c/{index % 4}".encode(), value(index)) for index in range(count))


def bytes_of(value: Chunk) -> bytes:
    return value if isinstance(value, bytes) else DATA[value[1] : value[1] + value[2]]


@pytest.mark.parametrize("count", [1, 2, 1000, 40_000])  # one node; several below one root
def test_tensorstore_reads_what_we_write(tmp_path: Path, count: int) -> None:
    entries = some_entries(count)
    put(tmp_path, entries)
    store = opened(tmp_path)
    assert sorted(store.list().result()) == [key for key, _ in entries]
    for key, value in entries[:: max(1, count // 200)]:
        assert store.read(key).result().value == bytes_of(value)
    assert store.read("layer_0/d").result().state == "missing"


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.binary(min_size=1, max_size=40), st.binary(max_size=1200), min_size=1, max_size=50))
def test_any_keys_and_values_come_back_from_both_readers(
    tmp_path_factory: pytest.TempPathFactory, values: dict[bytes, bytes]
) -> None:
    directory = tmp_path_factory.mktemp("store")
    put(directory, [(key, values[key]) for key in sorted(values)])
    store = opened(directory)
    assert {key: store.read(key).result().value for key in values} == values
    root = ocdbt.decode_manifest((directory / ocdbt.MANIFEST).read_bytes(), "manifest")
    assert root is not None
    path, offset, size = root.place
    body = (directory / path).read_bytes()[offset : offset + size]
    found, _ = ocdbt.decode_node(body, root, b"", "node")
    assert found and dict(found) == values


@pytest.mark.parametrize("node_bytes", [100_000_000, 100_000])  # one node, several
def test_we_read_what_tensorstore_merges_out_of_ours(tmp_path: Path, node_bytes: int) -> None:
    entries = some_entries(5000)
    put(tmp_path / "one", entries[::2])
    put(tmp_path / "two", entries[1::2])
    merged = opened(tmp_path, config={"compression": None, "max_decoded_node_bytes": node_bytes})
    transaction = ts.Transaction(atomic=True)
    for name in ("one", "two"):
        opened(tmp_path / name).experimental_copy_range_to(merged.with_transaction(transaction)).result()
    transaction.commit_async().result()
    places = LocalStore(str(tmp_path)).index()
    assert places is not None and len(places) == 5000
    for index, (key, value) in enumerate(entries):
        if isinstance(value, tuple):
            value = (f"{('one', 'two')[index % 2]}/{value[0]}", *value[1:])
        assert places[key.decode()] == value


def test_a_store_with_compressed_nodes_is_left_to_tensorstore(tmp_path: Path) -> None:
    opened(tmp_path, config={"compression": {"id": "zstd"}}).write("a", b"x" * 2000).result()
    assert LocalStore(str(tmp_path)).index() is None


@pytest.mark.parametrize("file", ["d/data", ocdbt.MANIFEST])
def test_a_flipped_bit_or_a_cut_in_the_tree_is_noticed(tmp_path: Path, file: str) -> None:
    put(tmp_path, some_entries(30))
    whole = (tmp_path / file).read_bytes()
    first = len(DATA) if file == "d/data" else 0
    for at in range(first, len(whole), 7):
        broken = bytearray(whole)
        broken[at] ^= 4
        (tmp_path / file).write_bytes(broken)
        with pytest.raises(Suspect):
            LocalStore(str(tmp_path)).index()
    (tmp_path / file).write_bytes(whole[:-1])
    with pytest.raises(Suspect):
        LocalStore(str(tmp_path)).index()


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_crc_of_two_strings_is_combined_from_theirs(first: bytes, second: bytes) -> None:
    combined = zarr_chunks.combined_crc32c(crc32c.crc32c(first), crc32c.crc32c(second), len(second))
    assert combined == crc32c.crc32c(first + second)


def test_the_crc_of_a_large_file_is_combined_without_reading_it_again() -> None:
    part = os.urandom(1 << 20)
    total = 0
    for _ in range(5):
        total = zarr_chunks.combined_crc32c(total, crc32c.crc32c(part), len(part))
    assert total == crc32c.crc32c(part * 5)

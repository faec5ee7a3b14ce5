"""What a chunk must be to be given out: whole, and of this save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import jax.numpy as jnp
import numpy as np
import pytest

import orchestrator as oc
from orchestrator import arrays, errors
from orchestrator.arrays.format import ocdbt
from orchestrator.rules import chunk_index, keys
from orchestrator.rules.chunk_index import StoredFiles
from orchestrator.rules.records import LeafSpec
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage.posix import PosixStorage
from tests.support.runs import now


def whole(elements: np.ndarray[Any, Any]) -> bytes:
    """A chunk as it is stored."""
    return elements.tobytes() + crc32c.crc32c(elements.tobytes()).to_bytes(4, "little")


ELEMENTS = {name: np.arange(4, dtype=np.float32) + ord(name) for name in "abc"}
SMALL_DAMAGE: dict[str, tuple[bytes | None, str]] = {
    "flipped": (b"\1" + whole(ELEMENTS["b"])[1:], "b: chunk b/c/0 in .*: crc32c .*, written "),
    "missing": (None, "b: chunk b/c/0 is missing"),
    "shorter": (whole(ELEMENTS["b"][:3]), "b: chunk b/c/0 in .* has 16 bytes, expected 20"),
    "of another save": (whole(ELEMENTS["a"]), "b: chunk b/c/0 in .*; it belongs to another save"),
}


def small_leaves(directory: Path, of_b: bytes | tuple[str, int, int] | None) -> Callable[[], list[Any]]:
    """Three leaves that are read together. `of_b`: what the store has in the place of b's chunk."""
    stored = {f"{name}/c/0": whole(elements) for name, elements in ELEMENTS.items()}
    entries = [(key.encode(), of_b if key == "b/c/0" else body) for key, body in stored.items()]
    nodes, manifest = ocdbt.encode(
        [key for key, value in entries if value], [value for _, value in entries if value], "nodes", 0, bytes(16), 1
    )
    (directory / "nodes").write_bytes(nodes)
    (directory / ocdbt.MANIFEST).write_bytes(manifest)
    (directory / "data").write_bytes(stored["b/c/0"])
    loads = [
        arrays.ReadRequest(LeafSpec(path=(name,), kind="numpy", shape=(4,), dtype="float32", chunk=(4,)))
        for name in ELEMENTS
    ]
    said = {key: f"{int.from_bytes(body[-4:], 'little'):08x}" for key, body in stored.items()}
    sizes = {name: (directory / name).stat().st_size for name in ("nodes", "data", ocdbt.MANIFEST)}
    return lambda: arrays.load(f"file://{directory}", loads, stored=StoredFiles(said, sizes))


@pytest.mark.parametrize("how", SMALL_DAMAGE)
def test_damage_of_one_of_many_leaves_that_are_read_together_names_it(tmp_path: Path, how: str) -> None:
    body, said = SMALL_DAMAGE[how]
    with pytest.raises(errors.Suspect, match=said):
        small_leaves(tmp_path, body)()


@pytest.mark.parametrize("of_b", [whole(ELEMENTS["b"]), ("data", 0, 20)], ids=["in the tree", "one in a file"])
def test_leaves_that_are_read_together_are_each_its_own(tmp_path: Path, of_b: bytes | tuple[str, int, int]) -> None:
    read = small_leaves(tmp_path, of_b)()
    for elements, value in zip(ELEMENTS.values(), read, strict=True):
        assert np.array_equal(value, elements) and value.ctypes.data % 64 == 0
        assert value.flags.c_contiguous and value.flags.writeable
    read[0][:] = 0
    assert np.array_equal(read[1], ELEMENTS["b"])


def test_another_saves_chunks_are_noticed_though_every_checksum_in_them_is_right(root: Path) -> None:
    """Files that consist of parts with a CRC-32C each all have one CRC-32C: the manifest's of the file says nothing."""
    values = np.random.default_rng(0)
    with oc.Agent(root, options=now()) as agent:
        for step in (1, 2):
            agent.save(step, {"w": jnp.asarray(values.integers(0, 256, (1024, 1024), np.uint8))})
    store = JournalStore(PosixStorage(str(root)), "test")
    one, two = store.find(1), store.find(2)
    assert one is not None and two is not None
    directory = f"{store.url}/{one.id.prefix}{keys.STATE}"
    own, other = store.step(one).manifest, store.step(two).manifest
    assert arrays.check(directory, chunk_index.stored(own)) == {}
    others = StoredFiles(other.chunks, chunk_index.stored(own).files)
    (said,) = arrays.check(directory, others).values()
    assert "belongs to another save" in said
    leaves = [arrays.ReadRequest(leaf) for leaf in store.step(one).intent.tree.leaves]
    assert len(arrays.load(directory, leaves, None, chunk_index.stored(own))) == 1
    with pytest.raises(errors.Suspect, match=r"w: chunk w/c/0/0 .* belongs to another save"):
        arrays.load(directory, leaves, None, others)

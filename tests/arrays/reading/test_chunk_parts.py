"""Of a chunk, only the parts that are needed are read, each checked by itself; damage in one is found all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays.reading import buffers, chunk_parts, local_source
from orchestrator.arrays.reading.chunk_source import chunk_reads
from orchestrator.arrays.reading.host_memory import Arena
from orchestrator.errors import Suspect
from orchestrator.job.read_step import ArrayReads, ReadOptions, read_step
from orchestrator.rules import chunk_index, zarr_chunks
from orchestrator.rules.records import Box, Place
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES, PART_BYTES
from tests.support.leaf_values import same
from tests.support.runs import now, store_of

LAYERS, DEPTH, WIDTH = 8, 256, 1024  # a layer is a chunk of 1 MiB: four parts of 64 rows each


@pytest.mark.parametrize("size", [PART_BYTES + 1, 2 * PART_BYTES - 1, 2 * PART_BYTES, 5 * PART_BYTES + 77, 4 << 20])
def test_checksums_of_the_parts_make_that_of_the_chunk(size: int) -> None:
    body = np.random.default_rng(size).bytes(size)
    parts = zarr_chunks.parts(size)
    assert b"".join(body[first:end] for first, end in parts) == body
    assert zarr_chunks.joined_crc32c([crc32c.crc32c(body[first:end]) for first, end in parts], size) == crc32c.crc32c(
        body
    )


def test_a_chunk_of_one_part_has_no_checksums_of_parts() -> None:
    assert zarr_chunks.parts(PART_BYTES) == [] == zarr_chunks.parts(1)


@pytest.mark.parametrize(
    ("shape", "region"),
    [
        ((6,), [(2, 4)]),
        ((4, 6), [(1, 3), (0, 6)]),
        ((4, 6), [(1, 3), (2, 5)]),
        ((3, 4, 5), [(0, 3), (1, 2), (0, 5)]),
        ((3, 4, 5), [(1, 3), (1, 3), (4, 5)]),
        ((3, 1, 5), [(0, 3), (0, 1), (0, 5)]),
        ((), []),
    ],
)
def test_runs_are_the_bytes_of_a_region(shape: tuple[int, ...], region: list[tuple[int, int]]) -> None:
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    needed = numbers[tuple(slice(*bounds) for bounds in region)].ravel() * 4
    starts, size = chunk_parts._runs(shape, region, 4)
    found = [start + at for start in starts.tolist() for at in range(0, size, 4)]
    assert sorted(found) == needed.tolist()


def on(axis: int) -> NamedSharding:
    spec = [None, None, None]
    spec[axis] = "data"  # type: ignore[call-overload]
    return NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec(*spec))


def layers() -> Any:
    return np.random.default_rng(0).random((LAYERS, DEPTH, WIDTH), np.float32)


@pytest.fixture
def saved(root: Path) -> Path:
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, {"w": jax.device_put(layers(), on(0))})
    return root


def first_rows(root: Path, rows: int) -> tuple[Any, int]:
    """What a process that needs so many rows of each layer restores, and how many bytes it reads for that: what other
    processes have on their devices, it leaves out."""
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    step = store.step(live)
    (leaf,) = step.intent.tree.leaves
    group = buffers.region_of(leaf, Box(start=(0, 0, 0), stop=(LAYERS, rows, WIDTH)))
    group.allocate(Arena())
    source = local_source.LocalSource(step.state_url, chunk_index.stored(step.manifest))
    counted: list[int] = []
    try:
        source.begin(chunk_reads([group], source), counted.append).result()
    finally:
        source.close()
    return group.buffers[0][0], sum(counted)


@pytest.mark.parametrize(("rows", "read"), [(1, 1 / 4), (64, 1 / 4), (65, 1 / 2), (192, 3 / 4), (193, 1), (256, 1)])
def test_a_process_reads_little_more_than_it_needs(saved: Path, rows: int, read: float) -> None:
    found, read_bytes = first_rows(saved, rows)
    assert np.array_equal(found, layers()[:, :rows])
    assert read_bytes == read * layers().nbytes


def places(root: Path) -> dict[str, tuple[Path, Place]]:
    """By chunk: its data file, and where it is there."""
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    step = store.step(live)
    return {
        key: (root / live.id.prefix / receipt.files[place.file].path, place)
        for receipt in step.receipts()
        for key, place in receipt.places.items()
    }


def changed(path: Path, offset: int) -> None:
    body = bytearray(path.read_bytes())
    body[offset] ^= 16
    path.write_bytes(body)


DAMAGE: dict[str, tuple[Callable[[Place], int], str]] = {
    "a part that is needed": (lambda place: place.offset + 70 * WIDTH * 4, "damaged"),
    "a part that is not": (lambda place: place.offset + place.bytes - 90, "restored"),
    "the checksum of a part": (lambda place: place.offset + place.bytes + 2, "restored"),
    "the checksum of the chunk": (lambda place: place.offset + place.bytes - 2, "damaged"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_in_what_is_needed_is_found_and_checksums_that_are_lost_cost_only_time(saved: Path, what: str) -> None:
    offset, outcome = DAMAGE[what]
    path, place = places(saved)["w/c/3/0/0"]
    changed(path, offset(place))
    like = {"w": jax.ShapeDtypeStruct((LAYERS, DEPTH, WIDTH), np.float32, sharding=on(1))}
    if outcome == "damaged":
        with pytest.raises(Suspect, match=r"w: chunk w/c/3/0/0 .*crc32c"):
            first_rows(saved, 100)
        with pytest.raises(oc.Damaged, match=r"w/c/3/0/0"):
            oc.open_run(saved).restore(like, step=1)
    else:
        assert np.array_equal(first_rows(saved, 100)[0], layers()[:, :100])


def test_a_step_without_checksums_of_parts_is_read_whole(saved: Path) -> None:
    """As earlier versions wrote it: what follows a chunk is the next one."""
    for path, place in places(saved).values():
        body = bytearray(path.read_bytes())
        end = place.offset + place.bytes
        body[end : end + 4 * CHECKSUM_BYTES] = bytes(range(4 * CHECKSUM_BYTES))
        path.write_bytes(body)
    found, read_bytes = first_rows(saved, 1)
    assert np.array_equal(found, layers()[:, :1]) and read_bytes == layers().nbytes


def test_the_last_chunk_of_a_file_that_ends_there_is_read_whole(saved: Path) -> None:
    path, place = max(places(saved).values(), key=lambda found: found[1].offset)
    body = path.read_bytes()
    path.write_bytes(body[: place.offset + place.bytes])
    assert np.array_equal(first_rows(saved, 1)[0], layers()[:, :1])


def test_a_restore_onto_another_mesh_gives_what_was_saved(saved: Path) -> None:
    for axis in (0, 1, 2):
        like = {"w": jax.ShapeDtypeStruct((LAYERS, DEPTH, WIDTH), np.float32, sharding=on(axis))}
        reads = ArrayReads()
        store = store_of(saved)
        live = store.find(1)
        assert live is not None
        same(read_step(store, live, like, ReadOptions(), reads).state, {"w": jax.device_put(layers(), on(axis))})
        assert reads.read_bytes == layers().nbytes

"""Chunks that have little of each dimension: any mesh reads little more than it needs, and nothing else changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays.reading import buffers, local_source
from orchestrator.arrays.reading.chunk_source import chunk_reads
from orchestrator.arrays.reading.host_memory import Arena
from orchestrator.arrays.tree import flatten
from orchestrator.rules import chunk_index, zarr_chunks
from orchestrator.rules.records import Box
from tests.support.leaf_values import every_pattern, same
from tests.support.runs import now, store_of

KIB, MIB = 1 << 10, 1 << 20

TILES = {
    "rows of 4 KiB: four runs of 1 KiB": ((2048, 1024), 4, (2048, 256)),
    "long rows: eight tiles beside each other, each of 4 MiB": ((65536, 4096), 4, (2048, 512)),
    "heads: the last dimension is short": ((4096, 16, 64), 4, (4096, 4, 64)),
    "layers: every dimension but the first": ((12, 768, 3072), 4, (12, 96, 384)),
    "of 8 bits": ((8192, 4096), 1, (4096, 1024)),
    "an odd number of columns": ((4096, 1023), 4, (1024, 1023)),
    "three times a power of two": ((1024, 2304), 4, (1024, 288)),
    "small": ((128, 1024), 4, (128, 512)),
    "smaller": ((64, 1024), 4, (64, 1024)),
    "one dimension": ((4 * MIB,), 4, (MIB,)),
    "no dimension": ((), 4, ()),
    "wide, of one row": ((1, 16 * MIB), 4, (1, MIB)),
}


@pytest.mark.parametrize("name", TILES)
def test_a_tile_has_little_of_each_dimension_as_long_as_its_runs_and_itself_are_long(name: str) -> None:
    shard, item_bytes, tile = TILES[name]
    assert zarr_chunks.tile_shape(shard, item_bytes) == tile
    assert all(size % part == 0 for size, part in zip(shard, tile, strict=True))
    size = math.prod(tile) * item_bytes
    assert min(math.prod(shard) * item_bytes, 256 * KIB) <= size <= zarr_chunks.CHUNK_BYTES


def over(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:4]), ("data",)), spec)


ROWS, COLUMNS = PartitionSpec("data"), PartitionSpec(None, "data")
TILED = now(chunks="tiles")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiled") / "run"
    with oc.Agent(root, options=TILED) as agent:
        assert agent.save(1, {name: jax.device_put(value, over(ROWS)) for name, value in values().items()})
    return root


def values() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"matrix": (2048, 1024), "heads": (1024, 16, 64), "layers": (4, 1024, 1024)}
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def read_of(root: Path, name: str, box: Box) -> tuple[Any, int]:
    """A region of a leaf, and how many bytes are read for it: what one host of a larger job would do."""
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    step = store.step(live)
    leaf = next(leaf for leaf in step.intent.tree.leaves if leaf.name == name)
    group = buffers.region_of(leaf, box)
    group.allocate(Arena())
    source, counted = local_source.LocalSource(step.state_url, chunk_index.stored(step.manifest)), list[int]()
    try:
        source.begin(chunk_reads([group], source), counted.append).result()
    finally:
        source.close()
    return group.buffers[0][0], sum(counted)


@pytest.mark.parametrize(
    ("name", "axis", "parts"),
    [("matrix", 0, 8), ("matrix", 1, 2), ("matrix", 1, 4), ("heads", 1, 4), ("layers", 1, 4), ("layers", 2, 4)],
)
def test_hosts_that_divide_any_dimension_read_what_they_need(saved: Path, name: str, axis: int, parts: int) -> None:
    whole = values()[name]
    step = whole.shape[axis] // parts
    for part in range(parts):
        where = [slice(0, size) for size in whole.shape]
        where[axis] = slice(part * step, (part + 1) * step)
        box = Box(start=tuple(one.start for one in where), stop=tuple(one.stop for one in where))
        found, read_bytes = read_of(saved, name, box)
        needed = whole[tuple(where)]
        assert np.array_equal(found, needed) and read_bytes <= 1.1 * needed.nbytes


def test_plain_orbax_and_an_agent_that_cuts_by_rows_read_it(saved: Path) -> None:
    like = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=over(COLUMNS)) for name, value in values().items()
    }
    with oc.Agent(saved, options=now(other_tree=False)) as agent:
        restored = agent.restore(like)
        assert restored is not None
        assert agent.save(2, restored.state), "the same run goes on, cut the other way"
        again = agent.restore(like, step=2)
    assert again is not None
    expected = {name: jax.device_put(value, over(COLUMNS)) for name, value in values().items()}
    same(restored.state, expected)
    same(again.state, expected)
    (state,) = saved.glob("steps/00000001/*/state")
    same(ocp.StandardCheckpointer().restore(state, like), expected)


WIDTHS = ("int4", "float8_e4m3fn", "bfloat16", "float32", "complex64")  # each of at least two tiles


@pytest.mark.parametrize("more", [{}, {"compression": True}, {"host_bytes_max": MIB}], ids=str)
def test_elements_of_every_width_come_back_bit_for_bit(root: Path, more: dict[str, Any]) -> None:
    plain = {name: np.resize(every_pattern(name), (1024, 2048)) for name in WIDTHS}
    state: dict[str, Any] = {name: jax.device_put(value, over(ROWS)) for name, value in plain.items()}
    state["replicated"] = jax.device_put(values()["matrix"], over(PartitionSpec()))
    state["numpy"] = values()["heads"]
    with oc.Agent(root, options=now(chunks="tiles", **more)) as agent:
        assert agent.save(1, state)
        same_mesh, other_mesh = (
            agent.restore(state),
            agent.restore(
                {
                    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over(COLUMNS))
                    for name, leaf in state.items()
                }
                | {"numpy": state["numpy"]}
            ),
        )
    assert same_mesh is not None and other_mesh is not None
    same(same_mesh.state, state)
    for name, value in plain.items():
        assert np.asarray(other_mesh.state[name]).tobytes() == value.tobytes(), name


def test_an_unknown_way_to_cut_is_rejected() -> None:
    with pytest.raises(oc.UsageError, match="chunks"):
        oc.Options(chunks="columns")  # type: ignore[arg-type]


def test_a_state_cut_the_other_way_is_another_form() -> None:
    state = {"matrix": jax.device_put(values()["matrix"], over(ROWS))}
    rows, tiled, again = flatten(state), flatten(state, tiled=True), flatten(state)
    assert again.form is rows.form is not tiled.form
    assert [flat.spec.leaves[0].chunk for flat in (rows, tiled, again)] == [(512, 1024), (512, 256), (512, 1024)]
    assert rows.spec.fingerprint() == tiled.spec.fingerprint(), "the same tree of a run"

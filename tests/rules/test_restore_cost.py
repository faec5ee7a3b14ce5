"""`orchestrator plan`: its arithmetic against what JAX lays out and what real restores read, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays import ReadRequest
from orchestrator.arrays.element_types import STORABLE, numpy_dtype
from orchestrator.arrays.reading.buffers import grouped
from orchestrator.arrays.reading.target_shardings import shardings_of
from orchestrator.arrays.tree import flatten
from orchestrator.cli.main import main
from orchestrator.cli.plan import RestorePlan
from orchestrator.errors import UsageError
from orchestrator.job.read_step import ArrayReads, ReadOptions, read_step
from orchestrator.rules import restore_cost
from orchestrator.rules.records import Box, LeafSpec
from orchestrator.rules.restore_cost import FILES_BYTES, STORE_BYTES, Cost, Measured, Target
from tests.support.runs import now

P = PartitionSpec
SPECS = {
    "both": P("data", "model"),
    "swapped": P("model", "data"),
    "together": P(("data", "model"), None),
    "reversed": P(None, ("model", "data")),
    "one": P("model"),
    "whole": P(),
}
MESHES = [{"data": 4, "model": 2}, {"data": 2, "model": 4}, {"data": 1, "model": 8}, {"data": 8}, {"other": 8}]


def mesh_of(axes: dict[str, int]) -> jax.sharding.Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


def on(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> NamedSharding:
    """As `plan` has it: an axis that the mesh lacks splits nothing."""
    kept = [tuple(n for n in ((e,) if isinstance(e, str) else e or ()) if n in mesh.shape) or None for e in spec]
    return NamedSharding(mesh, P(*kept))


def state(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    arrays = {
        name: jax.device_put(np.arange(64 * 128, dtype=np.float32).reshape(64, 128), NamedSharding(mesh, spec))
        for name, spec in SPECS.items()
    }
    rng = jax.device_put(jax.random.split(jax.random.key(0), 8), NamedSharding(mesh, P("data")))
    more = {"bf16": jnp.ones((3, 5), jnp.bfloat16), "numpy": np.arange(7), "count": 3, "empty": jnp.zeros((0, 4))}
    return {**arrays, **more, "rng": rng}


@pytest.fixture
def run(root: Path, mesh8: jax.sharding.Mesh) -> Path:
    with oc.Agent(root, options=now()) as agent:
        agent.save(5, state(mesh8))
    return root


def held(value: Any) -> int:
    """Bytes of a restored value on this host, each region once."""
    if not isinstance(value, jax.Array):
        return value.nbytes if isinstance(value, np.ndarray) else 0
    data = jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
    return sum({str(shard.index): shard.data.nbytes for shard in data.addressable_shards}.values())


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_bytes_and_requests_of_a_restore_are_foretold_exactly(run: Path, axes: dict[str, int]) -> None:
    mesh = mesh_of(axes)
    saved = state(mesh_of({"data": 4, "model": 2}))
    like = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=on(mesh, SPECS.get(name, P("data"))))
        if name in SPECS or name == "rng"
        else value
        for name, value in saved.items()
    }
    reader = oc.open_run(run)
    live = reader._store.find(5)
    assert live is not None
    tree = reader._store.step(live).intent.tree
    reads = ArrayReads()
    restored = read_step(reader._store, live, like, ReadOptions(), reads)
    (cost,) = restore_cost.forecast(tree, Target(axes, 1)).costs
    assert reads.read_bytes == cost.read_bytes
    targets = {"/".join(leaf.path): like["/".join(leaf.path)] for leaf in tree.leaves if leaf.in_store}
    loads = [
        ReadRequest(leaf, shardings_of([leaf.label], [targets["/".join(leaf.path)]], "")[0])
        for leaf in tree.leaves
        if leaf.in_store
    ]
    assert sum(len(one.layout.reads) * len(one.requests) for one in grouped(loads)) == cost.reads
    assert cost.array_bytes == sum(map(held, restored.state.values()))


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_process_needs_the_boxes_that_jax_gives_its_devices(axes: dict[str, int], processes: int) -> None:
    mesh = mesh_of(axes)
    for name, spec in SPECS.items():
        array = jax.device_put(np.zeros((64, 128), np.float32), NamedSharding(mesh_of(MESHES[0]), spec))
        (leaf,) = flatten({name: array}).spec.leaves
        got = list(restore_cost.boxes_by_process(leaf, restore_cost.partition(leaf), Target(axes, processes)))
        indices = on(mesh, spec).devices_indices_map((64, 128))
        wanted: list[set[Box]] = [set() for _ in range(processes)]
        for place, device in enumerate(mesh.devices.flat):
            bounds = [part.indices(size) for part, size in zip(indices[device], (64, 128), strict=True)]
            box = Box(start=tuple(b[0] for b in bounds), stop=tuple(b[1] for b in bounds))
            wanted[place * processes // 8].add(box)
        assert got == [frozenset(boxes) for boxes in wanted], name


@pytest.mark.parametrize(
    ("sharding", "split"),
    [
        ("P()", ()),
        ("P('data',)", (("data",),)),
        ("P('data', None)", (("data",), ())),
        ("PartitionSpec('data', None)", (("data",), ())),
        ("Partition('data', None)", None),
        ("P(None, ('data', 'model'))", ((), ("data", "model"))),
        ("P(('data',), 'model')", (("data",), ("model",))),
        ("P('data', \"it's\")", (("data",), ("it's",))),
        ("P(UNCONSTRAINED,)", None),
        ("SingleDeviceSharding", None),
        ("P('a', 'b', 'c')", None),  # more than there are dimensions
        ("P(1,)", None),
        ("P({'a': 1},)", None),
        ("P((('a',),),)", None),
        ("P('a'", None),
        ("P(" + "(" * 2000, None),
        ("P(" + "'a'," * 2000 + ")", None),
        ("P(__import__('os'),)", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_partition_spec_is_read_as_text_of_its_own(sharding: str, split: object) -> None:
    leaf = LeafSpec(path=("x",), kind="array", shape=(4, 4), dtype="float32", sharding=sharding)
    assert restore_cost.partition(leaf) == split


@pytest.mark.parametrize("dtype", sorted(STORABLE))
def test_an_elements_size_is_numpys(dtype: str) -> None:
    assert restore_cost.item_bytes(LeafSpec(path=("x",), kind="array", dtype=dtype)) == numpy_dtype(dtype).itemsize


def test_an_array_that_the_mesh_cannot_hold_is_named_with_its_dimension(run: Path) -> None:
    reader = oc.open_run(run)
    live = reader._store.find(5)
    assert live is not None
    tree = reader._store.step(live).intent.tree
    problems = restore_cost.forecast(tree, Target({"data": 3, "model": 1}, 1)).problems
    assert any(line.startswith("both[64, 128]: dimension 0 of 64 is not divisible by 3 (data)") for line in problems)
    assert not any("bf16" in line for line in problems)


def test_peak_memory_is_the_arrays_and_a_bounded_window() -> None:
    assert Cost(1 << 20, 1, 1 << 20, 1 << 20).peak_bytes(files=False) == 2 << 20
    assert Cost(9 << 30, 1, 4 << 30, 1).peak_bytes(files=True) == (4 << 30) + FILES_BYTES
    assert Cost(9 << 30, 1, 4 << 30, 1).peak_bytes(files=False) == (4 << 30) + STORE_BYTES


def restore(epoch: int, machine: str, seconds: float, array_s: float, read_bytes: int) -> Measured:
    return Measured((epoch, 0), machine, seconds, array_s, read_bytes)


def test_speed_is_that_of_a_machine_and_the_time_that_of_the_busiest_one() -> None:
    assert restore_cost.speed([restore(1, "a", 1.0, 0.5, 0)], 1) is None
    one = restore_cost.speed([restore(1, "a", 2.0, 1.0, 100), restore(1, "a", 3.0, 2.0, 100)], 4)
    assert one == restore_cost.Speed(2.0, 100.0, None, 1)  # twice as many processes agree on it
    assert one.seconds([Cost(100), Cost(300)]) == 2.0 + 4.0  # all on that one machine
    two = restore_cost.speed([restore(1, "a", 2.0, 1.0, 100), restore(1, "b", 2.0, 1.0, 100)], 4)
    assert two is not None and two.seconds([Cost(100), Cost(300)]) == 1.0 + 3.0  # each on its own


def test_on_one_machine_restores_by_as_many_processes_count_where_there_are_any() -> None:
    by_two = [restore(1, "a", 2.0, 1.0, 100), restore(1, "a", 2.0, 1.0, 100)]
    by_one = [restore(2, "a", 0.5, 0.25, 100)]
    rates = [restore_cost.speed(by_two + by_one, processes) for processes in (1, 2, 4)]
    assert [rate and (rate.machine_bytes_per_s, rate.restores) for rate in rates] == [(400, 1), (200, 1), (300, 2)]


@pytest.mark.parametrize(("text", "size"), [("64GiB", 64 << 30), ("1.5T", 3 << 39), ("800MB", 800 << 20), ("7", 7)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert restore_cost.parse_bytes("host_memory", text) == size


@pytest.mark.parametrize("text", ["", "data", "data=", "data=0", "data=2,data=2", "=3", "data=-1"])
def test_a_mesh_that_cannot_be_used_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="AXIS=SIZE"):
        restore_cost.parse_mesh(text)


def test_plan_says_whether_it_fits_and_why_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with oc.Agent(run, options=now()) as agent:
        agent.restore(state(mesh_of(MESHES[0])))
    capsys.readouterr()
    plan = ["orchestrator", "plan", str(run)]
    assert main([*plan, "--mesh=data=2,model=2", "--processes=2", "--host_memory=2GiB", "--json"]) == 0
    made = msgspec.json.decode(capsys.readouterr().out, type=RestorePlan)
    assert made.fits is True and made.devices == 4 and len(made.hosts) == 2 and made.seconds is not None
    assert made.read_bytes == sum(host.read_bytes for host in made.hosts) and made.amplification > 1
    assert main([*plan, "--mesh=data=2,model=2", "--processes=2", "--host_memory=1GiB"]) == 1
    assert "does not fit: process 0 needs" in capsys.readouterr().out
    assert main([*plan, "--mesh=data=5", "--processes=1"]) == 1
    assert "not divisible by 5" in capsys.readouterr().out
    assert main([*plan, "--mesh=data=4", "--processes=3"]) == 2
    assert main([*plan, "--json"]) == 0
    as_saved = json.loads(capsys.readouterr().out)
    assert as_saved["mesh"] == {"data": 4, "model": 2} and as_saved["fits"] is None


def test_plan_without_a_measured_restore_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["orchestrator", "plan", str(run)]) == 0
    assert "expected time: unknown (no restore of this run has been measured)" in capsys.readouterr().out

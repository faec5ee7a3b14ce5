"""What a process writes of each state of one form: which chunks of which shards, under which keys. Planned once.

A *form* is a state's tree, shapes, dtypes and shardings. The plan follows from it alone, so every later save reuses it:
for thousands of small leaves, planning takes several times as long as saving.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from orchestrator.arrays.element_types import bit_count, is_key, numpy_dtype
from orchestrator.arrays.format import ocdbt, orbax_files
from orchestrator.arrays.format.compressed import ZSTD
from orchestrator.arrays.inline_values import fits_int64
from orchestrator.arrays.leaf_errors import about
from orchestrator.arrays.leaf_specs import describe_array
from orchestrator.arrays.memory_kinds import in_default_memory, on_host
from orchestrator.arrays.tree import Flat, Form, tree_path
from orchestrator.rules import holders, zarr_chunks
from orchestrator.rules.boxes import box_of, shape_of, slices_in, volume, whole_box
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.kept import kept
from orchestrator.rules.records import Box, Held, LeafSpec

_CHECKSUM = {"name": "crc32c"}
_TIMEOUT_S = 60.0  # of TensorStore, in memory

# The chunks to write of one shard on the host: each one's key, and where it is in the shard.
Pieces = tuple[tuple[str, tuple[slice, ...]], ...]


@dataclass(frozen=True)
class LeafPlan:
    """What this process writes of one leaf.

    leaf: as the array store holds it. type: Orbax's name for its type. shards: (number among the addressable ones,
    pieces). whole: the dtype to copy a numpy value as, None for an array of JAX. small: each shard
    is one chunk that, with its CRC, is small enough for the store's tree.
    """

    leaf: LeafSpec
    type: str
    shards: tuple[tuple[int, Pieces], ...] = ()
    boxes: tuple[Box, ...] = ()
    sharding: jax.sharding.Sharding | None = None
    whole: np.dtype[Any] | None = None
    small: bool = False

    @functools.cached_property
    def viewed(self) -> bool:
        """Whether the elements can be taken from the arrays by Python's buffer protocol."""
        return self.sharding is not None and on_host(self.sharding) and self.leaf.dtype in _VIEWED

    @functools.cached_property
    def offloaded(self) -> bool:
        """Whether it is in host memory that an accelerator's runtime owns."""
        return self.sharding is not None and not on_host(self.sharding) and not in_default_memory(self.sharding)

    @functools.cached_property
    def off_host(self) -> bool:
        """Whether it is in an accelerator's own memory."""
        return self.sharding is not None and not on_host(self.sharding) and in_default_memory(self.sharding)

    @functools.cached_property
    def chunk_bytes(self) -> int:
        """Size of one chunk's elements."""
        return math.prod(self.leaf.chunk or ()) * _stored(self.leaf).itemsize


# The dtypes whose elements the buffer protocol gives; the others go through numpy.
_VIEWED = frozenset(
    ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
)


def _stored(leaf: LeafSpec) -> np.dtype[Any]:
    return numpy_dtype(leaf.stored_dtype or leaf.dtype)


@dataclass(frozen=True)
class KeyOrder:
    """Keys of a store as bytes, sorted, and the row of each."""

    raw: tuple[bytes, ...]
    rows: Mapping[str, int]

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeyOrder:
        pairs = sorted(((key.encode(), key) for key in keys), key=lambda pair: pair[0])
        return cls(tuple(raw for raw, _ in pairs), {key: row for row, (_, key) in enumerate(pairs)})


@dataclass(frozen=True, eq=False)
class Plan:
    """What a process writes of states of one form. held: who holds the leaves, by process 0's account; () in a job of
    one process. own: leaves of which it has its own copy; it writes none of them, and compares them with process
    0's."""

    form: Form
    leaves: tuple[LeafPlan, ...]
    compression: bool
    process: int
    held: tuple[Held, ...] = ()
    own: tuple[tuple[int, Held], ...] = ()

    @functools.cached_property
    def own_bytes(self) -> tuple[int, ...]:
        """Stored size of each leaf of `own`."""
        leaves = [self.form.leaves[number] for number, _ in self.own]
        return tuple(math.prod(leaf.file_shape) * _stored(leaf).itemsize if leaf.in_store else 0 for leaf in leaves)

    @functools.cached_property
    def mine(self) -> tuple[tuple[int, LeafPlan], ...]:
        """The leaves of which this process writes at least one chunk, each with its number."""
        return tuple((number, plan) for number, plan in enumerate(self.leaves) if plan.shards)

    @functools.cached_property
    def small(self) -> tuple[tuple[int, LeafPlan], ...]:
        """The leaves of `mine` whose chunks go with the receipt. None with compression: its sizes are not known in
        advance."""
        return (*self.small_on_host, *self.small_off_host)

    @functools.cached_property
    def small_on_host(self) -> tuple[tuple[int, LeafPlan], ...]:
        return tuple((number, plan) for number, plan in self.mine if self._is_small(plan) and not plan.off_host)

    @functools.cached_property
    def small_off_host(self) -> tuple[tuple[int, LeafPlan], ...]:
        return tuple((number, plan) for number, plan in self.mine if self._is_small(plan) and plan.off_host)

    def _is_small(self, plan: LeafPlan) -> bool:
        return plan.small and not self.compression

    @functools.cached_property
    def large(self) -> tuple[tuple[int, LeafPlan], ...]:
        return tuple((number, plan) for number, plan in self.mine if not self._is_small(plan))

    @functools.cached_property
    def off_host(self) -> tuple[tuple[int, LeafPlan], ...]:
        """The leaves of `small` and `large` that accelerators copy, in the order in which they are written."""
        return (*self.small_off_host, *((number, plan) for number, plan in self.large if plan.off_host))

    @functools.cached_property
    def small_chunks(self) -> tuple[tuple[str, int], ...]:
        """Key and bytes of each chunk of `small`, in order."""
        return tuple((key, plan.chunk_bytes) for _, plan in self.small for _, ((key, _),) in plan.shards)

    @functools.cached_property
    def chunk_count(self) -> int:
        """How many chunks this process writes."""
        return sum(len(pieces) for plan in self.leaves for _, pieces in plan.shards)

    @functools.cached_property
    def written_bytes(self) -> int:
        """Of the elements that this process writes; fewer with compression."""
        return sum(plan.chunk_bytes * len(pieces) for plan in self.leaves for _, pieces in plan.shards)

    @functools.cached_property
    def boxes(self) -> dict[str, tuple[Box, ...]]:
        """Leaf name -> regions that this process writes."""
        return {plan.leaf.name: plan.boxes for plan in self.leaves if plan.boxes and plan.leaf.in_store}

    @functools.cached_property
    def metadata(self) -> Mapping[str, bytes]:
        """zarr.json of every array of the store, by key."""
        stored = (plan.leaf for plan in self.leaves if plan.leaf.chunk is not None)
        return {zarr_chunks.metadata_key(leaf.name): self._zarr_json(leaf) for leaf in stored}

    def _zarr_json(self, leaf: LeafSpec) -> bytes:
        assert leaf.chunk is not None
        return _zarr_json(leaf.stored_dtype or leaf.dtype, leaf.file_shape, leaf.chunk, self.compression)

    @functools.cached_property
    def order(self) -> KeyOrder:
        """Of the merged store: the chunks of every array, whichever process writes them, and `metadata`."""
        chunks = (key for plan in self.leaves if plan.leaf.chunk is not None for key in _keys(plan.leaf))
        return KeyOrder.of([*chunks, *self.metadata])

    @functools.cached_property
    def orbax_files(self) -> Mapping[str, bytes]:
        """Orbax's own files, by path. They are the same on all processes, so process 0 writes them. (In Orbax each
        process describes the arrays; its reader takes the first description that it finds.)"""
        if self.process != 0:
            return {}
        arrays = [plan for plan in self.leaves if plan.type == "jax.Array"]
        leaves, types = [plan.leaf for plan in self.leaves], [plan.type for plan in self.leaves]
        written = {"_METADATA": orbax_files.tree_metadata(leaves, self.form.treedef, types)}
        if arrays:
            named = ((plan.leaf.name, plan.sharding) for plan in arrays if plan.sharding is not None)
            written["_sharding"] = orbax_files.shardings(named)
            written["array_metadatas/process_0"] = orbax_files.array_metadatas(plan.leaf for plan in arrays)
        return written


_PLANS = 4
_plans: OrderedDict[tuple[Form, int, bool, tuple[Held, ...]], Plan] = OrderedDict()


def plan_of(flat: Flat, process: int, compression: bool, held: tuple[Held, ...] = ()) -> Plan:
    """The plan of `process` for states of this form; kept for the last few forms. Main thread. Raises UsageError naming
    the leaves that are on other devices on this process than by `held`."""
    key = (flat.form, process, compression, held)
    known = _plans.get(key)
    if known is None:
        known = _plans[key] = _new_plan(flat, process, compression, held)
        if len(_plans) > _PLANS:
            _plans.popitem(last=False)
    return known


def _new_plan(flat: Flat, process: int, compression: bool, held: tuple[Held, ...]) -> Plan:
    leaves, layouts, own = flat.spec.leaves, _Layouts(), list[tuple[int, Held]]()
    runs: list[Held | None] = [None] * len(leaves)
    if held:
        seen = views(flat.form)
        holders.check_views(held, leaves, seen, process)
        runs = [*holders.each_of(held)]
        own = [
            (number, run)
            for number, (run, view) in enumerate(zip(holders.each_of(held), seen, strict=True))
            if process != 0 and run.by is None and view in (None, holders.alone(process))
        ]
    given = zip(leaves, flat.values, runs, strict=True)
    return Plan(
        flat.form, tuple(_plan(*each, process, layouts) for each in given), compression, process, held, tuple(own)
    )


@dataclass(frozen=True)
class Shard:
    """A shard on a device before there is one. small: its chunk goes with the receipt. direct: no program of ours
    copies it within the device: of PRNG keys' data, and of elements of less than a byte, whose layout depends on where
    they come from."""

    device: Any
    shape: tuple[int, ...]
    dtype: Any
    small: bool
    direct: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


def shards_off_host(plan: Plan, shards: Sequence[Any]) -> list[Shard]:
    """`shards`, arrays of one device each: those of `plan.off_host` that this process writes, in order."""
    few, given, found = len(plan.small_off_host), iter(shards), []
    for number, (_, leaf) in enumerate(plan.off_host):
        for _ in leaf.shards:
            shard = next(given)
            direct = leaf.leaf.kind == "key" or bit_count(shard.dtype) < 8
            device = next(iter(shard.sharding.device_set))
            found.append(Shard(device, shard.shape, shard.dtype, number < few, direct))
    return found


def shards_expected(like: Any, *, tiled: bool = False) -> list[Shard]:
    """What this process will write of states like this one (arrays, or jax.ShapeDtypeStruct with shardings) from
    accelerators, in the order of `Plan.off_host`. A forecast: leaves that each process has its own of are taken for
    shared ones, and PRNG keys left out."""
    small, large, layouts = list[Shard](), list[Shard](), _Layouts()
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, jax.sharding.Sharding) or on_host(sharding) or not in_default_memory(sharding):
            continue
        if is_key(leaf.dtype) or 0 in leaf.shape or bit_count(leaf.dtype) < 8:
            continue
        form = _Expected(tuple(leaf.shape), leaf.dtype, sharding)
        plan = _of_shards(describe_array(tree_path(path), form, tiled=tiled), form, "jax.Array", layouts)
        devices = [shard.device for shard in form.addressable_shards]
        shape = sharding.shard_shape(form.shape)
        into = small if plan.small else large
        into += [Shard(devices[index], shape, leaf.dtype, plan.small) for index, _ in plan.shards]
    return [*small, *large]


@dataclass(frozen=True)
class _ExpectedShard:
    index: tuple[slice, ...]
    replica_id: int
    device: Any


@dataclass(frozen=True)
class _Expected:
    """As much of an array as a plan asks for."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding

    @property
    def addressable_shards(self) -> list[_ExpectedShard]:
        seen: dict[Box, int] = {}
        found = []
        places: Any = self.sharding.devices_indices_map(self.shape)
        for device, index in places.items():
            box = box_of(index, self.shape)
            seen[box] = seen.get(box, -1) + 1
            if device.process_index == jax.process_index():
                found.append(_ExpectedShard(index, seen[box], device))
        return found


@kept
def views(form: Form) -> list[holders.View]:
    """How this process sees each leaf: the processes on whose devices it is; None where it is not an array of JAX."""
    found: list[holders.View] = [None] * len(form.leaves)
    for number, (_, sharding) in zip(form.arrays, form.shardings, strict=True):
        found[number] = _holders(sharding)
    return found


@functools.lru_cache(maxsize=256)
def _holders(sharding: jax.sharding.Sharding) -> holders.Ranges:
    devices: Any = sharding.device_set
    return holders.ranges(device.process_index for device in devices)


class _Layouts(dict[Any, tuple["_Layout", dict[int, Any]]]):
    """(sharding, shapes, chunk shape) -> its layout, and what this process writes of it, by turn."""


def _plan(leaf: LeafSpec, value: Any, run: Held | None, process: int, layouts: _Layouts) -> LeafPlan:
    with about(leaf):
        return _plan_of_leaf(leaf, value, run, process, layouts)


def _plan_of_leaf(leaf: LeafSpec, value: Any, run: Held | None, process: int, layouts: _Layouts) -> LeafPlan:
    """run: who holds the leaf; None in a job of one process."""
    if leaf.kind in ("bool", "int", "float"):
        if leaf.kind == "int" and not fits_int64(value):
            return LeafPlan(leaf, orbax_files.value_type(leaf, value, stored=False))
        dtype = np.asarray(value).dtype
        scalar = LeafSpec(path=leaf.path, kind=leaf.kind, shape=(), dtype=dtype.name, chunk=())
        return _whole(scalar, "scalar", dtype, process)
    type_name = orbax_files.value_type(leaf, value, stored=leaf.in_store)
    if not leaf.in_store:
        return LeafPlan(leaf, type_name)
    if run is not None and run.by is None:
        # An array of which each process has its own copy is stored as numpy: Orbax could not restore its sharding.
        type_name = "np.ndarray"
    if not isinstance(value, jax.Array):
        return _whole(leaf, "np.ndarray", numpy_dtype(leaf.dtype), process)
    if run is not None and not holders.includes(run.by or holders.alone(0), process):
        return LeafPlan(leaf, type_name, sharding=value.sharding)
    return _of_shards(leaf, as_stored(leaf, value), type_name, layouts)


def joinable(leaf: LeafSpec, value: jax.Array) -> bool:
    """Whether Python's buffer protocol gives the elements of the whole array on the host."""
    return leaf.dtype in _VIEWED and _on_one_cpu(value.sharding)


@functools.lru_cache(maxsize=256)
def _on_one_cpu(sharding: jax.sharding.Sharding) -> bool:
    return len(sharding.device_set) == 1 and on_host(sharding)


def as_stored(leaf: LeafSpec, value: Any) -> Any:
    """The array to store: of a PRNG key, its key data."""
    return jax.random.key_data(value) if leaf.kind == "key" else value


def _whole(leaf: LeafSpec, type_name: str, dtype: np.dtype[Any], process: int) -> LeafPlan:
    """Process 0's copy is the one that is stored."""
    if process != 0:
        return LeafPlan(leaf, type_name)
    assert leaf.chunk is not None
    box = whole_box(leaf.file_shape)
    pieces = _named(leaf.name, _pieces(box, leaf.chunk))
    return LeafPlan(leaf, type_name, ((0, pieces),), (box,), whole=dtype, small=_small(leaf, box))


def _small(leaf: LeafSpec, shard: Box) -> bool:
    shape = shape_of(shard)
    size = math.prod(shape) * _stored(leaf).itemsize
    return shape == leaf.chunk and size + zarr_chunks.CHECKSUM_BYTES <= ocdbt.INLINE_BYTES


def _pieces(box: Box, chunk: tuple[int, ...]) -> Pieces:
    """Their keys are suffixes: the leaf's name goes before each."""
    return tuple((zarr_chunks.suffix(one, chunk), slices_in(one, box)) for one in zarr_chunks.cut(box, chunk))


def _named(name: str, pieces: Pieces) -> Pieces:
    return tuple((name + suffix, where) for suffix, where in pieces)


@dataclass(frozen=True)
class _Layout:
    """How this process's shards of an array are cut into chunks: (shard index, its box, number of the replica,
    chunks)."""

    replicas: int
    shards: tuple[tuple[int, Box, int, tuple[Box, ...]], ...]


def _of_shards(leaf: LeafSpec, value: jax.Array | _Expected, type_name: str, layouts: _Layouts) -> LeafPlan:
    """Each chunk is written by one of the replicas that hold it, in turn, so that replicated arrays are spread evenly
    over their hosts."""
    key = (value.sharding, value.shape, leaf.file_shape, leaf.chunk)
    known = layouts.get(key)
    if known is None:
        known = layouts[key] = (_layout(leaf, value), {})
    layout, by_turn = known
    # With replicas, the turn depends on the leaf's name, so that many small leaves are spread, too.
    turn = zlib.crc32(leaf.name.encode()) % layout.replicas if layout.replicas > 1 else 0
    mine = by_turn.get(turn)
    if mine is None:
        mine = by_turn[turn] = _mine(layout, turn, leaf.chunk or ())
    shards, boxes = mine
    named = tuple((index, _named(leaf.name, pieces)) for index, pieces in shards)
    small = bool(layout.shards) and _small(leaf, layout.shards[0][1])
    return LeafPlan(leaf, type_name, named, boxes, value.sharding, small=small)


def _layout(leaf: LeafSpec, value: jax.Array | _Expected) -> _Layout:
    assert leaf.chunk is not None
    shape = leaf.file_shape
    shards = tuple(
        (index, box, shard.replica_id, tuple(zarr_chunks.cut(box, leaf.chunk)))
        for index, shard in enumerate(value.addressable_shards)
        for box in [box_of(shard.index, shape)]
    )
    distinct = math.prod(shape) // volume(shards[0][1]) if shards else 1
    return _Layout(max(1, len(value.sharding.device_set) // distinct), shards)


def _mine(layout: _Layout, turn: int, chunk: tuple[int, ...]) -> tuple[list[tuple[int, Pieces]], tuple[Box, ...]]:
    shards: list[tuple[int, Pieces]] = []
    boxes: list[Box] = []
    for index, box, replica, inside in layout.shards:
        if layout.replicas == 1:
            shards.append((index, _pieces(box, chunk)))
            boxes.append(box)
            continue
        chosen = [one for number, one in enumerate(inside) if (turn + number) % layout.replicas == replica]
        if chosen:
            shards.append((index, tuple((zarr_chunks.suffix(one, chunk), slices_in(one, box)) for one in chosen)))
            boxes.extend(chosen)
    return shards, tuple(boxes)


def _keys(leaf: LeafSpec) -> Iterator[str]:
    assert leaf.chunk is not None
    whole = whole_box(leaf.file_shape)
    return (zarr_chunks.key(leaf.name, box, leaf.chunk) for box in zarr_chunks.cut(whole, leaf.chunk))


@functools.lru_cache(maxsize=4096)
def _zarr_json(dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...], compression: bool) -> bytes:
    return zarr_chunks.metadata(_template(dtype, compression), shape, chunk)


@functools.lru_cache(maxsize=256)
def _template(dtype: str, compression: bool) -> dict[str, object]:
    """TensorStore's own `zarr.json` of an array of `dtype`, made in memory. Of a small float that came to it later
    (`float8_e8m0fnu`, with 0.1.86) what a newer one makes: chunks are written and read without it."""
    if not _has_type(dtype):
        assert ITEM_BYTES[dtype] == 1, dtype
        return {**_template("uint8", compression), "data_type": dtype, "fill_value": 0.0}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *([ZSTD] if compression else []), _CHECKSUM]
    spec = {
        "driver": "zarr3",
        "kvstore": "memory://",
        "metadata": {"data_type": dtype, "shape": [1], "codecs": codecs},
    }
    store: Any = ts.open(spec, create=True).result(timeout=_TIMEOUT_S).kvstore
    return dict(json.loads(store.read("zarr.json").result(timeout=_TIMEOUT_S).value))


def _has_type(dtype: str) -> bool:
    try:
        ts.dtype(dtype)
    except ValueError:
        return False
    return True

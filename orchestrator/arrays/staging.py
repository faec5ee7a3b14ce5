"""What a process writes of each leaf, taken from the devices: which chunks, and their elements on the host."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from orchestrator import chunks
from orchestrator.arrays import orbax_files
from orchestrator.records import Box, LeafSpec
from orchestrator.tree import INT64, numpy_dtype

Array = np.ndarray[Any, Any]
# A region of a leaf to write: its elements, and of each chunk in it the key's end and where it is in them.
Part = tuple[Array, tuple[tuple[str, tuple[slice, ...]], ...]]


@dataclass
class Staged:
    """One leaf on the host: what this process writes of it. `type`: Orbax's name for what it is."""

    leaf: LeafSpec
    type: str
    parts: Sequence[Part] = ()
    boxes: tuple[Box, ...] = ()
    sharding: jax.sharding.Sharding | None = None
    text: str | None = None  # of a string

    @property
    def describes(self) -> bool:
        """Whether this process writes the array's `zarr.json`: whoever has its first element."""
        return any(not any(box.start) for box in self.boxes)


# (sharding, shapes, chunk shape) -> its layout, and of it, by turn, what this process writes.
Layouts = dict[Any, tuple["_Layout", dict[int, Any]]]


@functools.lru_cache(maxsize=256)
def on_host(sharding: jax.sharding.Sharding) -> bool:
    device: Any = next(iter(sharding.device_set))
    return bool(device.platform == "cpu")


def start_transfer(value: jax.Array) -> None:
    for index in range(len(value.sharding.addressable_devices)):
        value.addressable_data(index).copy_to_host_async()


def host_local(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1


def stage(leaf: LeafSpec, value: Any, process: int, layouts: Layouts) -> Staged:
    if leaf.kind in ("bool", "int", "float"):
        if leaf.kind == "int" and value not in INT64:
            return Staged(leaf, orbax_files.value_type(leaf, value, stored=False))
        data = np.asarray(value)
        inner = LeafSpec(path=leaf.path, kind=leaf.kind, shape=(), dtype=data.dtype.name, chunk=())
        return _whole(inner, data, process)
    type_name = orbax_files.value_type(leaf, value, stored=leaf.in_store)
    if not leaf.in_store:
        return Staged(leaf, type_name, text=value if leaf.kind == "str" else None)
    if leaf.kind == "key":
        value = jax.random.key_data(value)
    if not isinstance(value, jax.Array) or host_local(value):  # process 0's copy is the one that is stored
        dtype = numpy_dtype(leaf.stored_dtype if leaf.kind == "key" else leaf.dtype)
        # A copy in native byte order: the caller may overwrite his array as soon as we return.
        return _whole(leaf, np.array(value, dtype=dtype, order="C") if process == 0 else None, process)
    return _stage_shards(leaf, value, layouts)


def _whole(leaf: LeafSpec, data: Array | None, process: int) -> Staged:
    # An array that each process has for itself is numpy to Orbax: it has no sharding that others would know.
    type_name = "scalar" if leaf.kind in ("bool", "int", "float") else "np.ndarray"
    if process != 0:
        return Staged(leaf, type_name)
    assert data is not None and leaf.chunk is not None
    shape = leaf.file_shape
    box = Box(start=(0,) * len(shape), stop=shape)
    return Staged(leaf, type_name, [(data, _pieces(box, leaf.chunk))], (box,))


def _pieces(box: Box, chunk: tuple[int, ...]) -> tuple[tuple[str, tuple[slice, ...]], ...]:
    return tuple((chunks.suffix(one, chunk), chunks.within(one, box)) for one in chunks.cut(box, chunk))


@dataclass(frozen=True)
class _Layout:
    """How the shards of an array are cut, and which of it this process writes: (shard index, chunks of it, boxes)."""

    replicas: int
    shards: tuple[tuple[int, Box, int, tuple[Box, ...]], ...]


def _stage_shards(leaf: LeafSpec, value: jax.Array, layouts: Layouts) -> Staged:
    """The chunks that this process writes: each chunk is written by one of the replicas that hold it, in turn, so that
    replicated arrays are spread evenly over their hosts.

    `_arrays` is private (jax 0.10.2): what addressable_data looks up, which takes twice as long for small arrays.
    tests/test_private_apis.py watches it.
    """
    key = (value.sharding, value.shape, leaf.file_shape, leaf.chunk)
    known = layouts.get(key)
    if known is None:
        known = layouts[key] = (_layout(leaf, value), {})
    layout, by_turn = known
    # Where there are replicas, the turn depends on the leaf: many small ones are spread, too.
    turn = zlib.crc32(leaf.name.encode()) % layout.replicas if layout.replicas > 1 else 0
    mine = by_turn.get(turn)
    if mine is None:
        mine = by_turn[turn] = _mine(layout, turn, leaf.chunk or ())
    shards, boxes = mine
    held: Any = value._arrays  # type: ignore[attr-defined]
    parts = [(np.asarray(held[index]), pieces) for index, pieces in shards]
    return Staged(leaf, "jax.Array", parts, boxes, value.sharding)


def _layout(leaf: LeafSpec, value: jax.Array) -> _Layout:
    assert leaf.chunk is not None
    shape = leaf.file_shape
    shards = tuple(
        (index, box, shard.replica_id, tuple(chunks.cut(box, leaf.chunk)))
        for index, shard in enumerate(value.addressable_shards)
        for box in [chunks.box_of(shard.index, shape)]
    )
    distinct = math.prod(shape) // math.prod(chunks.shape_of(shards[0][1])) if shards else 1
    return _Layout(max(1, len(value.sharding.device_set) // distinct), shards)


def _mine(layout: _Layout, turn: int, chunk: tuple[int, ...]) -> tuple[list[Any], tuple[Box, ...]]:
    shards: list[tuple[int, tuple[tuple[str, tuple[slice, ...]], ...]]] = []
    boxes: list[Box] = []
    for index, box, replica, inside in layout.shards:
        if layout.replicas == 1:
            shards.append((index, _pieces(box, chunk)))
            boxes.append(box)
            continue
        chosen = [one for number, one in enumerate(inside) if (turn + number) % layout.replicas == replica]
        if chosen:
            shards.append((index, tuple((chunks.suffix(one, chunk), chunks.within(one, box)) for one in chosen)))
            boxes.extend(chosen)
    return shards, tuple(boxes)

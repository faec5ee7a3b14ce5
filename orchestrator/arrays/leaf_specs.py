"""What one leaf of a state is: its kind, and for an array its shape, dtype and how it is cut into chunks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.element_types import STORABLE, is_key
from orchestrator.arrays.inline_values import text_of
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.errors import UnsupportedLeaf
from orchestrator.rules import zarr_chunks
from orchestrator.rules.dtypes import STORED_AS
from orchestrator.rules.matching import TargetLeaf
from orchestrator.rules.records import LeafSpec


def describe(path: tuple[str, ...], value: Any, *, must_live: bool = True, tiled: bool = False) -> LeafSpec:
    """The spec of a leaf; `tiled`: arrays of JAX in chunks that have little of each dimension. Moves no data. Raises
    UnsupportedLeaf naming the leaf if it cannot be stored, and where `must_live`, if it is an array that was donated or
    deleted."""
    label = "/".join(path) or "(root)"
    if isinstance(value, jax.Array):
        if isinstance(value, jax.core.Tracer):
            raise UnsupportedLeaf(f"{label}: {value} is being traced; save and restore outside of jax.jit and the like")
        if must_live:
            check_live(label, value)
        return _describe_key(path, value) if is_key(value.dtype) else describe_array(path, value, tiled=tiled)
    if isinstance(value, np.ndarray | np.generic):
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        stored = STORED_AS.get(value.dtype.name, "")
        if (stored or value.dtype.name) not in STORABLE:
            raise UnsupportedLeaf(
                f"{label}: numpy dtype {value.dtype} cannot be stored; convert it to numbers or bytes"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise UnsupportedLeaf(f"{label}: a masked array would lose its mask; save `data` and `mask` as two leaves")
        chunk = zarr_chunks.chunk_shape(value.shape, value.dtype.itemsize) if value.size else None
        return LeafSpec(
            path=path, kind=kind, shape=value.shape, dtype=value.dtype.name, stored_dtype=stored, chunk=chunk
        )
    try:
        text = text_of(value)
        if isinstance(value, str):
            value.encode()
    except ValueError as error:  # lone surrogates; an int of thousands of digits
        raise UnsupportedLeaf(f"{label}: {error}; keep it as bytes") from error
    if text is None:
        raise UnsupportedLeaf(
            f"{label}: {type(value).__module__}.{type(value).__qualname__} is neither an array nor a plain value; "
            "register its class with jax.tree_util.register_dataclass, or keep it in `extra`"
        )
    return LeafSpec(path=path, kind=text[0], value=text[1])


def check_live(label: str, value: jax.Array) -> None:
    """Raises UnsupportedLeaf if the array's memory belongs to somebody else by now."""
    if value.is_deleted():
        raise UnsupportedLeaf(f"{label}: the array was donated or deleted; save the state that the step returned")


def describe_array(path: tuple[str, ...], value: Any, *, tiled: bool = False) -> LeafSpec:
    """Of an array of numbers, or of what has its dtype, shape and sharding. Raises UnsupportedLeaf."""
    name, stored, sharding, chunk = _array_form(value.dtype, value.shape, value.sharding, tiled)
    if (stored or name) not in STORABLE:
        raise UnsupportedLeaf(f"{'/'.join(path)}: dtype {name} cannot be stored; cast it to one that TensorStore has")
    return LeafSpec(
        path=path, kind="array", shape=value.shape, dtype=name, stored_dtype=stored, sharding=sharding, chunk=chunk
    )


@in_own_context
def _describe_key(path: tuple[str, ...], value: jax.Array) -> LeafSpec:
    data = jax.eval_shape(jax.random.key_data, value)
    return LeafSpec(
        path=path,
        kind="key",
        shape=value.shape,
        dtype=str(value.dtype),
        stored_shape=tuple(data.shape),
        stored_dtype=str(data.dtype),
        sharding=_sharding_text(value.sharding),
        value=str(jax.random.key_impl(value)),
        chunk=_chunk(value.shape, value.sharding, tuple(data.shape), data.dtype.itemsize),
    )


@functools.lru_cache(maxsize=4096)
def _array_form(
    dtype: np.dtype[Any], shape: tuple[int, ...], sharding: jax.sharding.Sharding, tiled: bool
) -> tuple[str, str, str, tuple[int, ...] | None]:
    """dtype, stored dtype, sharding and chunk shape of a leaf: a state has many leaves of few forms."""
    chunk = _chunk(shape, sharding, shape, dtype.itemsize, tiled)
    return dtype.name, STORED_AS.get(dtype.name, ""), _sharding_text(sharding), chunk


def _sharding_text(sharding: jax.sharding.Sharding) -> str:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return type(sharding).__name__
    return "P" + str(sharding.spec).removeprefix("PartitionSpec").removeprefix("P")  # JAX before 0.9 spells it out


def _chunk(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    stored_shape: tuple[int, ...],
    item_bytes: int,
    tiled: bool = False,
) -> tuple[int, ...] | None:
    """Chunks tile every shard, so that no two processes write one chunk. None for an array without elements."""
    if 0 in shape:
        return None
    shard = sharding.shard_shape(shape)
    shape_of = zarr_chunks.tile_shape if tiled else zarr_chunks.chunk_shape
    return shape_of((*shard, *stored_shape[len(shard) :]), item_bytes)


def target_leaf(path: tuple[str, ...], value: Any) -> TargetLeaf:
    """What a leaf of a restore's target asks for. Raises UnsupportedLeaf as `describe`."""
    if isinstance(value, jax.ShapeDtypeStruct):
        kind, dtype = _target_form(value.dtype)
        return TargetLeaf(path, kind, tuple(value.shape), dtype, _held(value.dtype))
    spec = describe(path, value, must_live=False)
    return TargetLeaf(path, spec.kind, spec.shape, spec.dtype)


@functools.lru_cache(maxsize=256)
def _target_form(dtype: Any) -> tuple[str, str]:
    """(kind, dtype's name) of an abstract array. Kept, as numpy takes 30 microseconds to name one."""
    return "key" if is_key(dtype) else "array", str(dtype)


def _held(dtype: Any) -> str:
    """The dtype that an array of `dtype` has in this process, '' if it is that one. It may change: x64 is a setting."""
    held = dtype if is_key(dtype) else jax.dtypes.canonicalize_dtype(dtype)
    return "" if held == dtype else str(held)

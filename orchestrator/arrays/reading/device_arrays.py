"""The values of restored leaves: device arrays made of filled buffers, and what no file holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.element_types import carrier, numpy_dtype
from orchestrator.arrays.inline_values import inline_value
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.jax_internals import arrays_of_shards
from orchestrator.arrays.leaf_errors import about
from orchestrator.arrays.memory_kinds import on_host
from orchestrator.arrays.reading.buffers import BufferGroup
from orchestrator.arrays.reading.host_memory import Array
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.errors import UsageError
from orchestrator.rules.records import LeafSpec

_THREADS = 8  # at most, that copy replicas


@in_own_context
def make_arrays(groups: Sequence[BufferGroup], values: list[Any]) -> list[Any]:
    """Make the values of leaves whose buffers are filled, put each at its position in `values`, and return them. The
    groups hold no buffers afterwards. Main thread. Raises an error that names the leaf."""
    if replicas := [pair for group in groups for pair in group.replicas]:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="replicas") as pool:
            list(pool.map(lambda pair: np.copyto(*pair), replicas))
    made = []
    for group in groups:
        with about(group.leaf):
            of_group = _values(group)
        for position, value in zip(group.positions, of_group, strict=True):
            values[position] = value
        made += of_group
        group.release()
    return made


@in_own_context
def value_without_file(request: ReadRequest) -> Any:
    """The value of a leaf that no file holds: it is in the tree spec, or has no elements."""
    return _empty_array(request) if request.leaf.kind_stored else inline_value(request.leaf)


def _values(group: BufferGroup) -> list[Any]:
    """The values of leaves of one form. A CPU device takes the buffers over as they are."""
    request, leaf = group.requests[0], group.leaf
    converted = [request.converted(data) for data in group.buffers]
    rows = range(len(group.requests))
    if request.sharding is None:
        return [converted[0][row, ...][()] if leaf.kind == "numpy_scalar" else converted[0][row, ...] for row in rows]
    dtype = group.restored_dtype  # a process that has none of the devices has no buffers
    if request.frame and (carried := carrier(dtype)):
        dtype, converted = carried, [data.view(carried) for data in converted]
    shape = request.frame.shape if request.frame else leaf.file_shape
    layout, devices = group.layout, list(group.layout.devices)
    if group.owned:
        value = jax.make_array_from_single_device_arrays(shape, request.sharding, group.owned)
        return [_key(value, leaf) if leaf.kind == "key" else value]
    # To a CPU device by a copy, so that the array can be donated. What is exchanged never is.
    copied = on_host(request.sharding) and not request.frame
    # Iterating over the first dimension is twice as quick as an index for each row; without others, it gives numbers.
    hosts = [list(data) if data.ndim > 1 else [data[row, ...] for row in rows] for data in converted]
    shards: Iterable[list[Any]] = map(list, zip(*(hosts[number] for number in layout.buffer_of), strict=True))
    if copied and len(layout.buffer_of) > len(hosts) > 1:
        shards = map(_unshared, shards)
    values: list[Any] = arrays_of_shards(
        shape, dtype, request.sharding, shards if hosts else ([] for _ in rows), devices, copied=copied
    )
    return [_key(value, leaf) for value in values] if leaf.kind == "key" else values


def _unshared(shards: list[Array]) -> list[Array]:
    """With memory of its own for each: jaxlib 0.10.2 fails (bad_function_call) to copy shards for several devices some
    of which share their memory."""
    first = {id(shard): number for number, shard in reversed(list(enumerate(shards)))}
    return [shard if first[id(shard)] == number else shard.copy() for number, shard in enumerate(shards)]


def _key(data: Any, leaf: LeafSpec) -> Any:
    try:
        return jax.random.wrap_key_data(data, impl=leaf.value)
    except (ValueError, TypeError) as error:
        text = f"{leaf.label}: keys of implementation {leaf.value!r} cannot be made of {leaf.stored_shape}"
        raise UsageError(f"{text} by this JAX; define it first: {error}") from error


@in_own_context
def as_array(leaf: LeafSpec, value: Any, dtype: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A number that was saved as another kind of leaf, as an array without dimensions; numpy's where `sharding` is
    None. Raises UsageError naming the leaf if `dtype` cannot hold it."""
    try:
        host = np.asarray(value, dtype)
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(
            f"{leaf.label}: {value!r} cannot be held as {dtype}: {error}; ask for a wider dtype"
        ) from error
    return host if sharding is None else _spread(host, sharding)


def _spread(host: Array, sharding: jax.sharding.Sharding) -> Any:
    """An array that every process has on its host, on the devices of `sharding`, some of which may belong to other
    processes."""
    dtype = jax.dtypes.canonicalize_dtype(host.dtype)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index], dtype=dtype)


def _empty_array(request: ReadRequest) -> Any:
    """An array without elements, from its spec alone."""
    leaf = request.leaf
    dtype = request.dtype or (leaf.stored_dtype if leaf.kind == "key" else None) or leaf.dtype
    host = np.zeros(leaf.file_shape, numpy_dtype(str(dtype)) if isinstance(dtype, str) else dtype)
    if request.sharding is None:
        return host
    array = _spread(host, request.sharding)
    return _key(array, leaf) if leaf.kind == "key" else array

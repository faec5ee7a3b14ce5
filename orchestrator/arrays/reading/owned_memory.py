"""Arrays of CPU devices in memory that XLA has allocated itself, to be read into.

XLA's CPU client takes over a numpy buffer without a copy, but never reuses such a buffer when the array is donated: the
first donating step after a restore would need the state's memory a second time. Memory that XLA has allocated is
reused. So large arrays are made by a program that allocates its results and writes nothing, and the chunks are read
straight into them: no copy, no byte of memory more. (Small ones are read into numpy buffers and copied, which is
quicker than a program: see `device_arrays`.)

Writing into a jax.Array is safe here for these reasons, all of which tests/arrays/reading/test_owned_memory.py holds:
the arrays have been waited for, so nothing of JAX writes any more; each is a fresh allocation of one run of the
program, with an address of its own, no constant and no other array's; nobody else has seen them until `device_arrays`
makes the restored arrays of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from orchestrator.arrays import page_locked
from orchestrator.arrays.element_types import bit_count
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.memory_kinds import on_host
from orchestrator.arrays.reading.buffers import BufferGroup
from orchestrator.arrays.reading.host_memory import LARGE_PAGE_BYTES, LARGE_PAGES, reserve

try:
    from jax.experimental import buffer_callback as _callbacks
except ImportError:
    _callbacks = None  # type: ignore[assignment]

ARRAY_BYTES = 4 << 20  # of one device: copying less takes no longer than compiling one result more
TOTAL_BYTES = 32 << 20  # less than that in all is copied in the time that it takes to compile a program

PartForm = tuple[tuple[int, ...], Any]  # shape and dtype of one device's part, of one dimension at least
Array = np.ndarray[Any, Any]


def use_owned_memory(groups: Sequence[BufferGroup]) -> None:
    """Give those groups whose arrays are large and on CPU devices buffers that are those arrays' own memory, if there
    is enough of them. Main thread. Raises MemoryError."""
    by_devices: dict[tuple[Any, ...], list[BufferGroup]] = {}
    for group in groups:
        if _is_ownable(group):
            by_devices.setdefault(group.layout.devices, []).append(group)
    for devices, some in by_devices.items():
        size = len(devices) * sum(group.leaf_bytes // len(group.layout.shapes) for group in some)
        if size < TOTAL_BYTES:
            continue
        reserve(size)  # XLA would end the process
        made = allocate(devices, [(group.layout.shapes[0], group.restored_dtype) for group in some])
        for group, arrays in zip(some, made or (), strict=False):
            _use_memory_of(arrays, group)


def _is_ownable(group: BufferGroup) -> bool:
    """Whether it is worth it, of arrays on CPU devices."""
    sharding = group.requests[0].sharding
    return sharding is not None and group.leaf_bytes >= ARRAY_BYTES and on_host(sharding) and group.is_unchanged


def _use_memory_of(arrays: list[Any], group: BufferGroup) -> None:
    group.owned = arrays
    views = [memory(array).view(group.dtype).reshape(1, *array.shape) for array in arrays]
    first: dict[int, Array] = {}
    for number, view in zip(group.layout.buffer_of, views, strict=True):
        if first.setdefault(number, view) is not view:
            group.replicas.append((view, first[number]))
    group.buffers = [first[number] for number in range(len(group.layout.shapes))]


@in_own_context
def allocate(devices: tuple[Any, ...], forms: Sequence[PartForm]) -> list[list[Any]] | None:
    """For each form an array on each of `devices`, CPUs of this process, with whatever is in memory. None in a JAX
    that has no such program: everything is copied then. Main thread. Raises MemoryError."""
    if not _has_callbacks():
        return None
    waiting: dict[PartForm, list[int]] = {}
    for number, form in enumerate(forms):
        waiting.setdefault(form, []).append(number)
    found: list[list[Any]] = [[] for _ in forms]
    while waiting:  # a program for each set of forms: a model has many layers of few
        try:
            made = jax.block_until_ready(_program(devices, tuple(waiting))())
        except jax.errors.JaxRuntimeError as error:
            raise MemoryError(f"{len(forms)} arrays: {error}") from error
        for array, numbers in zip(made, list(waiting.values()), strict=True):
            by_device = {shard.device: shard.data for shard in array.addressable_shards}
            found[numbers.pop()] = [by_device[device] for device in devices]
        waiting = {form: numbers for form, numbers in waiting.items() if numbers}
    addresses = {part.unsafe_buffer_pointer() for parts in found for part in parts}
    assert len(addresses) == len(devices) * len(forms)
    return found


def _has_callbacks() -> bool:
    return _callbacks is not None


@functools.lru_cache(maxsize=64)
def _program(devices: tuple[Any, ...], forms: tuple[PartForm, ...]) -> Any:
    def make() -> Any:
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in forms]
        return _callbacks.buffer_callback(_leave_untouched, results)()

    mesh = Mesh(np.array(devices), ("shard",))
    return jax.jit(jax.shard_map(make, mesh=mesh, in_specs=(), out_specs=PartitionSpec("shard"), check_vma=False))


def _leave_untouched(context: Any, results: Any) -> None:
    """The callback that leaves its results as they have been allocated."""


def memory(array: Any) -> Array:
    """The bytes of an array on one CPU device, to write to."""
    raw = page_locked.memory(array)
    assert bit_count(array.dtype) >= 8
    first = -raw.ctypes.data % LARGE_PAGE_BYTES
    if LARGE_PAGES is not None and raw.nbytes - first >= LARGE_PAGE_BYTES:
        # Nothing has touched it yet: in small pages every 4 KiB would be a page fault.
        with contextlib.suppress(OSError, AttributeError):
            size = (raw.nbytes - first) // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES
            _madvise()(raw.ctypes.data + first, size, LARGE_PAGES)
    return raw


@functools.lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        raise OSError
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

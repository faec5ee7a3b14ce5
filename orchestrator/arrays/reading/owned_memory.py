"""Arrays of CPU devices in memory that XLA has allocated itself, to be read into.

XLA's CPU client takes a numpy buffer over without a copy, but never reuses such a buffer when the array is donated: the
first donating step after a restore would need the state's memory a second time. What XLA has allocated it reuses. So
large arrays are made by a program that allocates its results and writes nothing, and the chunks are read straight into
them: no copy, no byte of memory more. (Small ones are read into numpy buffers and copied, which is quicker than a
program: see `placing`.)

Writing into a jax.Array is safe here for these reasons, all held by tests/arrays/test_owned_memory.py: the arrays have
been waited for, so nothing of JAX writes any more; each is a fresh allocation of one run of the program, with an
address of its own, no constant and no other array's; nobody else has seen them until `placing` makes the restored
arrays of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from orchestrator.arrays.jax_context import in_own_context

try:
    from jax.experimental import buffer_callback as _callbacks
except ImportError:
    _callbacks = None  # type: ignore[assignment]

ARRAY_BYTES = 4 << 20  # of one device: copying less takes no longer than compiling one result more
TOTAL_BYTES = 32 << 20  # less than that in all is copied in the time that it takes to compile a program
_PAGE_BYTES = 2 << 20  # a large page
_LARGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)

Form = tuple[tuple[int, ...], Any]  # shape and dtype of one device's part, of one dimension at least
Array = np.ndarray[Any, Any]


@in_own_context
def allocate(devices: tuple[Any, ...], forms: Sequence[Form]) -> list[list[Any]] | None:
    """For each form an array on each of `devices`, CPUs of this process, with whatever is in memory. None in a JAX
    that has no such program: everything is copied then. Main thread. Raises MemoryError."""
    if not _has_callbacks():
        return None
    waiting: dict[Form, list[int]] = {}
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
def _program(devices: tuple[Any, ...], forms: tuple[Form, ...]) -> Any:
    def make() -> Any:
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in forms]
        return _callbacks.buffer_callback(_nothing, results)()

    mesh = Mesh(np.array(devices), ("shard",))
    return jax.jit(jax.shard_map(make, mesh=mesh, in_specs=(), out_specs=PartitionSpec("shard"), check_vma=False))


def _nothing(context: Any, results: Any) -> None:
    """The callback that leaves its results as they have been allocated."""


def bit_count(dtype: Any) -> int:
    """Of an element, which numpy keeps in a byte at least and XLA in what it takes."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(ml_dtypes.iinfo(dtype).bits)
    return int(ml_dtypes.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * np.dtype(dtype).itemsize


def memory(array: Any) -> Array:
    """The bytes of an array on one CPU device, to write to; they are there as long as the array is."""
    address, size = array.unsafe_buffer_pointer(), math.prod(array.shape) * array.dtype.itemsize
    assert bit_count(array.dtype) >= 8
    first = -address % _PAGE_BYTES
    if _LARGE_PAGES is not None and size - first >= _PAGE_BYTES:
        # Nothing has touched it yet: in small pages every 4 KiB would be a page fault.
        with contextlib.suppress(OSError, AttributeError):
            _madvise()(address + first, (size - first) // _PAGE_BYTES * _PAGE_BYTES, _LARGE_PAGES)
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)


@functools.lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        raise OSError
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function

"""Page-locked memory of the host, which accelerators copy to and from at the rate of the link (an H100: 50 GiB/s; to
ordinary memory 2, from it 29). JAX has it as the memory kind `pinned_host`, takes half a second to lock a gigabyte, and
keeps what is released for whoever asks next: saves and restores share it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.jax_internals import arrays_of_shards
from orchestrator.arrays.memory_kinds import PINNED_HOST

NO_ROOM = (ValueError, jax.errors.JaxRuntimeError)  # the platform has no page-locked memory; it has run out

_THREADS = 4  # that make arrays
Array = np.ndarray[Any, Any]
Form = tuple[Any, tuple[int, ...], np.dtype[Any]]  # device, shape, dtype


@in_own_context
def copies(shards: list[Any]) -> list[Any]:
    """Begin to copy arrays, of one accelerator each, to page-locked memory. Raises one of NO_ROOM."""
    targets = [shard.sharding.with_memory_kind(PINNED_HOST) for shard in shards]
    begun: list[Any] = jax.device_put(shards, targets)
    return begun


def memory(array: Any) -> Array:
    """The bytes of an array on one device whose memory is the host's, to write to. The array lives as long as they."""
    size = math.prod(array.shape) * array.dtype.itemsize
    raw = (ctypes.c_ubyte * size).from_address(array.unsafe_buffer_pointer())
    raw.array = array
    return np.frombuffer(raw, np.uint8)


class ReusedArrays:
    """Page-locked arrays that are filled on the host and copied to a device, again and again. Those of one form are
    given out again once they are returned; at most `most_bytes` are kept for that. Main thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._free: dict[Form, list[Any]] = {}
        self._free_bytes = 0
        self._is_ours = True  # to write to, as far as anybody has tried

    def prepare(self, forms: Sequence[Form]) -> None:
        """Make arrays of these forms, on several threads: until it is written to, memory is slow."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="page-lock") as pool, contextlib.suppress(*NO_ROOM):
            self.give_back(list(pool.map(_made, forms)))

    @in_own_context
    def take(self, forms: Sequence[Form]) -> list[Any] | None:
        """An array of each form, with whatever is in it; None where there is no such memory, no more of it, or none
        that numpy sees."""
        taken: list[Any] = []
        try:
            for form in forms if self._is_ours else ():
                free = self._taken(form)
                taken.append(self._new(form) if free is None else free)
            jax.block_until_ready(taken)  # nothing of JAX writes to them any more
            self._is_ours = self._is_ours and all(map(_is_on_host, taken))
        except NO_ROOM:
            self.give_back(taken)
            return None
        if self._is_ours:
            return taken
        self._free.clear()
        self._free_bytes = 0
        return None

    def _new(self, form: Form) -> Any:
        self._keep_at_most(self._most_bytes - _bytes(form))
        return _made(form)

    def _taken(self, form: Form) -> Any:
        free = self._free.get(form)
        if not free:
            return None
        self._free_bytes -= free[-1].nbytes
        return free.pop()

    def give_back(self, arrays: Sequence[Any]) -> None:
        """Arrays that were taken, and that nothing reads or writes any more."""
        for array in arrays:
            self._keep_at_most(self._most_bytes - array.nbytes)
            form = (*array.sharding.device_set, array.shape, array.dtype)
            self._free.setdefault(form, []).append(array)
            self._free_bytes += array.nbytes

    def _keep_at_most(self, size: int) -> None:
        while self._free and self._free_bytes > size:
            form = next(iter(self._free))  # the one that has been here the longest
            if self._taken(form) is None:
                del self._free[form]


def _bytes(form: Form) -> int:
    return math.prod(form[1]) * form[2].itemsize


def _is_on_host(array: Any) -> bool:
    """Whether numpy sees the very memory that the array has (else its address is a device's), its own."""
    address, zeros = array.unsafe_buffer_pointer(), _zeros(array.nbytes).ctypes.data
    return bool(np.asarray(array).ctypes.data == address and address != zeros)


@in_own_context
def _made(form: Form) -> Any:
    device, shape, dtype = form
    size = _bytes(form)
    target = SingleDeviceSharding(device, memory_kind=PINNED_HOST)
    # `device_put` may take the zeros over as they are, whatever `may_alias` says.
    zeros = _zeros(size).view(dtype).reshape(shape)
    return arrays_of_shards(shape, dtype, target, [[zeros]], [device], copied=True)[0]


@functools.lru_cache(maxsize=1)
def _zeros(size: int) -> Array:
    """To make arrays of, without a compiler: never written to, so that they are one page."""
    return np.zeros(size, np.uint8)

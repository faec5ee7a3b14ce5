"""Bytes of all processes on each of them, by the devices: two programs, kept for all messages of a process.

`multihost_utils` does the same, and makes its mesh and its program anew for each message, which costs more processor
time than the message. Main thread; every process calls them in the same order. Nothing here is bounded: a barrier that
is comes first (`rendezvous`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.jax_internals import arrays_of_shards

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Collectives:
    """Over all devices of the job, of which every process has as many."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        by_process = sorted(devices, key=lambda device: device.process_index)
        mesh = Mesh(np.array(by_process).reshape(jax.process_count(), -1), ("processes", "local_devices"))
        self._process, self._count = jax.process_index(), jax.process_count()
        self._own = list(mesh.devices[self._process])
        self._row_each = NamedSharding(mesh, PartitionSpec("processes"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._all = jax.jit(_as_it_is, out_shardings=everywhere)
        self._sum = jax.jit(_total, out_shardings=everywhere)

    @in_own_context
    def gathered(self, row: Bytes) -> Bytes:
        """Each process's row, all of one length."""
        return np.asarray(self._all(self._placed(row)).addressable_data(0))

    @in_own_context
    def broadcast(self, row: Bytes) -> Bytes:
        """Process 0's row; the others give one of its length."""
        row = row if self._process == 0 else np.zeros_like(row)
        return np.asarray(self._sum(self._placed(row)).addressable_data(0))

    def _placed(self, row: Bytes) -> jax.Array:
        parts = [row[None].copy() for _ in self._own]  # each its own memory, as `arrays_of_shards` takes them
        shape = (self._count, len(row))
        (placed,) = arrays_of_shards(shape, row.dtype, self._row_each, [parts], self._own, copied=True)
        return placed


def collectives() -> Collectives:
    """Of this process's job."""
    return _of(tuple(jax.devices()))


_of = functools.lru_cache(maxsize=1)(Collectives)


def _as_it_is(rows: jax.Array) -> jax.Array:
    return rows


def _total(rows: jax.Array) -> jax.Array:
    return jnp.sum(rows, axis=0, dtype=rows.dtype)

"""All that this package uses of JAX's internals (jax 0.7 to 0.12), each with why no public name will do. Nothing else
imports `jax._src` or reads a private attribute of JAX's objects. tests/arrays/test_private_apis.py watches every one.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.experimental
import numpy as np
from jax._src import api as _api
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import distributed as _distributed
from jax._src import mesh as _mesh
from jax._src import xla_bridge as _xla_bridge
from jax._src.lib import _jax  # type: ignore[attr-defined]
from jax._src.lib import xla_client as _xla  # type: ignore[attr-defined]

_make_gloo = _jax.make_gloo_tcp_collectives


# Settings. Public from jax 0.8 on, taken from there where it is.


def enable_x64() -> Any:
    """A context with 64-bit types."""
    where: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return where.enable_x64(True)


def mesh_that_is_set() -> jax.sharding.Mesh:
    """By `jax.set_mesh`; an empty one if none is. Raises ValueError where JAX traces."""
    if hasattr(jax.sharding, "get_mesh"):
        return jax.sharding.get_mesh()
    if not _core.trace_state_clean():
        raise ValueError("JAX traces a function")
    found: jax.sharding.Mesh = _mesh.get_concrete_mesh()
    return found


# Arrays.


def programs_know(dtype: Any) -> bool:
    """Whether XLA's programs see such elements as they are: those of jaxlib 0.7 for CPUs take four elements of two bits
    for one. Copies to devices and back are right."""
    return jax.__version_info__ >= (0, 8) or np.dtype(dtype).name not in ("int2", "uint2")


def shards_of(array: Any) -> Sequence[Any]:
    """This process's shards of an array, each an array of one device. `addressable_data` gives other objects, which
    know nothing of a copy to the host that was begun on these, and takes twice as long for small arrays."""
    shards: Sequence[Any] = array._arrays
    return shards


def arrays_of_shards(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    sharding: jax.sharding.Sharding,
    shards: Iterable[list[Any]],
    devices: Sequence[jax.Device],
    *,
    copied: bool,
) -> list[jax.Array]:
    """Arrays of one form, each out of its shards on the host, one for each of `devices`. copied: they have memory of
    their own; else CPU devices take the shards' over. One call for all shards of an array: `device_put` takes ten times
    as long for small ones. If the sharding replicates the array, JAX takes the first shard for all."""
    semantics = _xla.HostBufferSemantics
    how = semantics.IMMUTABLE_ONLY_DURING_CALL if copied else semantics.ZERO_COPY
    aval, on = _core.ShapedArray(shape, dtype), list(devices)
    return [_xla.batched_device_put(aval, sharding, of_array, on, True, False, how) for of_array in shards]


# The job.


def process_of_job() -> tuple[int, int] | None:
    """This process's index and how many there are, as `jax.distributed` was told; None where it is not initialized. No
    backend is made for it, as `jax.process_index` would."""
    state = _distributed.global_state
    return None if state.client is None else (state.process_id, state.num_processes)


def has_backend() -> bool:
    """Whether JAX has its devices already, so that it is too late to join a job. Every public name would make them."""
    return bool(_xla_bridge.backends_are_initialized())


def coordination_client() -> Any:
    """The client of JAX's coordination service, None without `jax.distributed`: it has no public accessor."""
    return _distributed.global_state.client


def coordinator_address() -> str:
    """host:port of JAX's coordination service, as this process was given it; '' without `jax.distributed`."""
    return _distributed.global_state.coordinator_address or ""


def has_preemption_service() -> bool:
    """Whether JAX listens for SIGTERM, and can have all processes agree on a step."""
    return _distributed.global_state.preemption_sync_manager is not None


def collectives_listen_on(address: str) -> None:
    """Have JAX's collectives between CPUs (Gloo) listen on `address`: no option says where. Before JAX has a
    backend."""
    _jax.make_gloo_tcp_collectives = functools.partial(_make_gloo, hostname=address)


def skip_exit_barrier() -> None:
    """Let this process end without waiting for the others, which JAX's exit handlers do. The client and the service
    wait, too, when they go: they are kept for ever."""
    for handler in (_api.clean_up, _dispatch.wait_for_tokens):
        atexit.unregister(handler)
    state = _distributed.global_state
    for kept in (state.preemption_sync_manager, state.client, state.service):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))

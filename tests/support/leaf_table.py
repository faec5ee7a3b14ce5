"""Every kind of leaf on every kind of place, each with bits that follow from its name: any process can check them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

# Shape and dtype; of keys: of their integers, of which the last dimension is the key's.
KINDS: dict[str, tuple[tuple[int, ...], Any]] = {
    "f32": ((24, 4), np.float32),
    "bf16": ((24,), jnp.bfloat16),
    "bool": ((24,), np.bool_),
    "int4": ((24,), jnp.int4),
    "scalar": ((), np.float32),
    "none": ((0, 4), np.float32),
    "key": ((2,), np.uint32),
    "keys": ((24, 2), np.uint32),
    "raw_key": ((2,), np.uint32),
    "large": ((768, 352), np.float32),
}
ATTESTED = ("f32", "key", "large")  # each form of a shard is a program to compile
TYPED_KEYS = frozenset(("key", "keys"))
ON_HOST: dict[str, Any] = {
    "numpy": np.arange(5),
    "numpy_big_endian": np.arange(5, dtype=">f4"),
    "numpy_scalar": np.float64(0.1),
    "int": 7,
    "float": -0.0,
    "bool": True,
    "complex": 1j,
    "str": "adam",
    "bytes": b"\x00\xff",
    "None": None,
    "empty": (),
}


def places(count: int) -> dict[str, Sharding]:
    """Of a job of `count` processes, as this one sees them: `local` ones are each process's own, `stage1` is the same
    on all. Where there are fewer processes than at the save, their devices are shared out."""
    devices = jax.devices()
    share = len(devices) // count
    local = jax.local_devices()
    found: dict[str, Sharding] = {
        "global": _rows(devices),
        "replicated": _replicated(devices),
        "offloaded": _rows(devices, "pinned_host"),
        "but_first": _rows(devices[share:] or devices[4:]),  # of all processes but the first
        "but_first_replicated": _replicated(devices[share:] or devices[4:]),
        "local": SingleDeviceSharding(local[0]),
        "local_rows": _rows(local[:2]),
        "local_replicated": _replicated(local[:2]),
        "local_offloaded": SingleDeviceSharding(local[0], memory_kind="pinned_host"),
    }
    for stage in range(count):
        part = devices[stage * share : (stage + 1) * share]
        found |= {
            f"stage{stage}": _rows(part),
            f"stage{stage}_replicated": _replicated(part),
            f"stage{stage}_offloaded": _rows(part, "pinned_host"),
            f"device_of{stage}": SingleDeviceSharding(part[-1]),
        }
    return found


def _rows(devices: Iterable[Any], memory_kind: str | None = None) -> Sharding:
    return NamedSharding(Mesh(np.array(list(devices)), ("x",)), PartitionSpec("x"), memory_kind=memory_kind)


def _replicated(devices: Iterable[Any]) -> Sharding:
    return NamedSharding(Mesh(np.array(list(devices)), ("x",)), PartitionSpec())


def fitting(kind: str, sharding: Sharding) -> Sharding:
    """The same devices, for what cannot be cut by rows."""
    if isinstance(sharding, NamedSharding) and kind in ("scalar", "none", "key", "raw_key"):
        return NamedSharding(sharding.mesh, PartitionSpec(), memory_kind=sharding.memory_kind)
    return sharding


def bits(name: str, kind: str) -> np.ndarray[Any, Any]:
    shape, dtype = KINDS[kind]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    size = np.dtype(dtype).itemsize
    if kind in ("bool", "int4"):
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.integers(0, 256, (*shape, size), dtype=np.uint8).view(dtype).reshape(shape)


def array(name: str, kind: str, sharding: Sharding) -> jax.Array:
    data = bits(name, kind)
    made = jax.make_array_from_callback(data.shape, sharding, lambda at: data[at], dtype=data.dtype)
    return jax.random.wrap_key_data(made) if kind in TYPED_KEYS else made


def state(
    where: dict[str, Sharding],
    kinds: Iterable[str] = KINDS,
    make: Callable[[str, str, Sharding], Any] = array,
    named: Callable[[str], str] = lambda place: place,
) -> dict[str, Any]:
    """One leaf for each kind and place, and those of the host. `named`: at which place each was saved."""
    return {
        f"{named(place)}-{kind}": make(f"{named(place)}-{kind}", kind, fitting(kind, at))
        for place, at in where.items()
        for kind in kinds
    } | ON_HOST


def target(name: str, kind: str, sharding: Sharding) -> jax.ShapeDtypeStruct:
    shape, dtype = KINDS[kind]
    if kind in TYPED_KEYS:
        return jax.ShapeDtypeStruct(shape[:-1], jax.random.key(0).dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def wrong(restored: dict[str, Any], like: dict[str, Any]) -> list[str]:
    """The leaves that are not, bit for bit, what their names say, on the devices that `like` says."""
    found = []
    for name, expected in like.items():
        value = restored[name]
        if name in ON_HOST:
            same = value is None or (type(value), str(value)) == (type(expected), str(expected))
        else:
            same = value.sharding.is_equivalent_to(expected.sharding, value.ndim) and _same_bits(name, value)
        if not same:
            found.append(name)
    return found


def _same_bits(name: str, value: jax.Array) -> bool:
    kind = name.rpartition("-")[2]
    data = bits(name, kind)
    if len(value.addressable_shards) != len(value.sharding.addressable_devices):
        return False
    if not value.addressable_shards:
        return value.shape == (data.shape[:-1] if kind in TYPED_KEYS else data.shape)
    stored = jax.random.key_data(value) if kind in TYPED_KEYS else value
    return stored.dtype == data.dtype and all(
        np.asarray(shard.data).tobytes() == np.ascontiguousarray(data[shard.index]).tobytes()
        for shard in stored.addressable_shards
    )

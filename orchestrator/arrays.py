"""The data plane: pytrees to and from an ordinary Orbax checkpoint. The only importer of Orbax and TensorStore.

Writing goes through Orbax's handler layer (`PyTreeCheckpointHandler`: OCDBT, zarr3, uncompressed unless asked), which
contains no cross-process barrier. Reading goes straight to TensorStore, because Orbax needs a target or the topology
of the writer, and we know every leaf from the attempt's tree spec.

How each kind of leaf is stored is in docs/reference/on-disk-format.md. In short: arrays by Orbax; Python scalars,
strings, bytes, None and empty containers exactly, in the tree spec (and, where Orbax can, in its files too, for plain
readers); zero-size arrays in the tree spec alone; anything else is refused before anything is written.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from orchestrator.errors import Damaged, UnsupportedLeaf, WaitTimeout
from orchestrator.plan import TargetLeaf
from orchestrator.records import Box, LeafSpec, TreeSpec

# dtypes that JAX has and TensorStore (0.1.86) has not: stored as another of the same width, bit for bit.
_STORED_AS = {"uint2": "int2", "uint4": "int4", "float8_e4m3": "uint8"}
_LOAD_CONCURRENCY = 64
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Flat:
    """A tree taken apart: the spec, and for each leaf of it the value to store."""

    spec: TreeSpec
    values: tuple[Any, ...]
    treedef: Any
    mesh: dict[str, int]


def flatten(tree: Any) -> Flat:
    """Describe every leaf of `tree`. Moves no data.

    Raises UnsupportedLeaf naming the path for values that cannot be stored, deleted (donated) arrays and name clashes.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
    leaves = tuple(_describe(_path(path), value) for path, value in with_paths)
    _check_names(leaves)
    values = tuple(value for _, value in with_paths)
    meshes = [sharding.mesh for value in values if (sharding := _named(value))]
    return Flat(TreeSpec(leaves=leaves), values, treedef, dict(meshes[0].shape) if meshes else {})


def targets(like: Any) -> tuple[list[TargetLeaf], list[Any], Any]:
    """A target tree taken apart: what is wanted at each path, the target leaves themselves, the tree structure."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_empty)
    wanted = []
    for raw_path, value in with_paths:
        path = _path(raw_path)
        if isinstance(value, jax.ShapeDtypeStruct):
            kind = "key" if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else "array"
            wanted.append(TargetLeaf(path, kind, tuple(value.shape), str(value.dtype)))
        else:
            spec = _describe(path, value, check_live=False)
            wanted.append(TargetLeaf(path, spec.kind, spec.shape, spec.dtype))
    return wanted, [value for _, value in with_paths], treedef


def _is_empty(value: Any) -> bool:
    """None and empty containers are leaves for us: they are part of what was saved."""
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _path(path: Sequence[Any]) -> tuple[str, ...]:
    names = []
    for key in path:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    return tuple(names)


def _named(value: Any) -> jax.sharding.NamedSharding | None:
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _describe(path: tuple[str, ...], value: Any, *, check_live: bool = True) -> LeafSpec:
    label = "/".join(path) or "(root)"
    if isinstance(value, jax.Array):
        if check_live and value.is_deleted():
            raise UnsupportedLeaf(f"{label}: the array was donated or deleted; save the state that the step returned")
        return _describe_jax(path, value)
    if isinstance(value, np.ndarray | np.generic):
        kind = "numpy" if isinstance(value, np.ndarray) else "numpy_scalar"
        stored = _STORED_AS.get(value.dtype.name, "")
        if not _storable(stored or value.dtype.name):
            raise UnsupportedLeaf(
                f"{label}: numpy dtype {value.dtype} cannot be stored; convert it to numbers or bytes"
            )
        return LeafSpec(path=path, kind=kind, shape=value.shape, dtype=value.dtype.name, stored_dtype=stored)
    text = _inline(value)
    if text is None:
        raise UnsupportedLeaf(
            f"{label}: {type(value).__module__}.{type(value).__qualname__} is neither an array nor a plain value; "
            "register its class with jax.tree_util.register_dataclass, or keep it in `extra`"
        )
    return LeafSpec(path=path, kind=text[0], value=text[1])


def _describe_jax(path: tuple[str, ...], value: jax.Array) -> LeafSpec:
    named = _named(value)
    sharding = str(named.spec) if named else type(value.sharding).__name__
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, value)
        return LeafSpec(
            path=path,
            kind="key",
            shape=value.shape,
            dtype=str(value.dtype),
            stored_shape=tuple(data.shape),
            stored_dtype=str(data.dtype),
            sharding=sharding,
            value=str(jax.random.key_impl(value)),
        )
    name = value.dtype.name
    stored = _STORED_AS.get(name, "")
    if not _storable(stored or name):
        raise UnsupportedLeaf(f"{'/'.join(path)}: dtype {name} cannot be stored; cast it to one that TensorStore has")
    return LeafSpec(path=path, kind="array", shape=value.shape, dtype=name, stored_dtype=stored, sharding=sharding)


def _storable(name: str) -> bool:
    if name.startswith(("object", "str", "bytes", "void", "datetime", "timedelta")):
        return False
    try:
        ts.dtype(name)
    except (TypeError, ValueError):
        return False
    return True


def _inline(value: Any) -> tuple[str, str] | None:
    """(kind, text) of a value kept in the tree spec; None if it is not one. Exact: floats as hex."""
    match value:
        case None:
            return "none", ""
        case bool():
            return "bool", str(value)
        case int():
            return "int", str(int(value))
        case float():
            return "float", float.hex(value)
        case complex():
            return "complex", f"{float.hex(value.real)} {float.hex(value.imag)}"
        case str():
            return "str", value
        case bytes():
            return "bytes", base64.b64encode(value).decode()
        case dict() | list() | tuple() if not value:
            return "empty", "tuple" if isinstance(value, tuple) else type(value).__name__
    return None


def inline_value(leaf: LeafSpec) -> Any:
    """The Python value of a leaf kept in the tree spec. Inverse of what `flatten` recorded."""
    match leaf.kind:
        case "none":
            return None
        case "bool":
            return leaf.value == "True"
        case "int":
            return int(leaf.value)
        case "float":
            return float.fromhex(leaf.value)
        case "complex":
            real, imag = leaf.value.split()
            return complex(float.fromhex(real), float.fromhex(imag))
        case "str":
            return leaf.value
        case "bytes":
            return base64.b64decode(leaf.value, validate=True)
        case "empty":
            return {"tuple": (), "list": []}.get(leaf.value, {})
    raise Damaged(f"{leaf.label}: unknown kind {leaf.kind!r} in the tree spec")


def _check_names(leaves: Sequence[LeafSpec]) -> None:
    """Orbax joins a path with dots and TensorStore appends `/zarr.json`: names must stay apart under both."""
    seen: dict[str, LeafSpec] = {}
    for leaf in leaves:
        other = seen.setdefault(leaf.name, leaf)
        if other is not leaf:
            raise UnsupportedLeaf(f"{leaf.label} and {other.label} would both be stored as {leaf.name!r}; rename one")
    for name, leaf in seen.items():
        parts = name.split("/")
        for end in range(1, len(parts)):
            above = seen.get("/".join(parts[:end]))
            if above is not None:
                raise UnsupportedLeaf(f"{leaf.label} would be stored inside {above.label}; rename one")


@dataclass(frozen=True)
class ArrayOptions:
    """compression: zstd for each chunk (smaller, several times slower on a fast disk)."""

    compression: bool = False


class ArrayWriter:
    """Writes attempts' `state/` directories. `stage` on the main thread; the rest on any one thread at a time."""

    def __init__(self, options: ArrayOptions, process: int) -> None:
        # Replica 0 of each shard is written, whole, by the process that holds it: what `_boxes` says in the receipt.
        registry = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, ocp.type_handlers.ArrayHandler(replica_id=0, use_replica_parallel=False)),
            (np.ndarray, ocp.type_handlers.NumpyHandler()),
            (int, ocp.type_handlers.ScalarHandler()),
            (float, ocp.type_handlers.ScalarHandler()),
            (str, ocp.type_handlers.StringHandler()),
        )
        self._process = process
        self._handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, use_compression=options.compression, type_handler_registry=registry
        )

    def stage(self, directory: str, flat: Flat) -> PendingWrite:
        """Take what is needed from the devices and start writing below URL `directory`.

        When it returns, the caller may donate or overwrite every array of the tree: none of it can leak into the
        checkpoint. Blocks for one device-to-host copy.
        """
        local = [_stored_form(leaf, value) for leaf, value in zip(flat.spec.leaves, flat.values, strict=True)]
        tree = jax.tree_util.tree_unflatten(flat.treedef, local)
        arguments = ocp.args.PyTreeSave(tree)
        futures = asyncio.run(self._handler.async_save(_orbax_path(directory, make=True), args=arguments))
        boxes = {
            leaf.name: regions
            for leaf, value in zip(flat.spec.leaves, flat.values, strict=True)
            if leaf.in_store and (regions := _boxes(leaf, value, self._process))
        }
        return PendingWrite(tuple(futures or ()), boxes)

    def finalize(self, directory: str) -> None:
        """Merge the processes' OCDBT manifests into one. Called by one process when all have written."""
        self._handler.finalize(_orbax_path(directory))

    def close(self) -> None:
        self._handler.close()


def _orbax_path(url: str, *, make: bool = False) -> epath.Path:
    """Orbax's path of a directory URL. Local directories are made; an object store has none."""
    path = epath.Path(url.removeprefix("file://"))
    if make and "://" not in str(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class PendingWrite:
    """A staged state on its way to the store. `boxes`: leaf name -> regions that this process writes."""

    futures: tuple[Any, ...]
    boxes: Mapping[str, tuple[Box, ...]]

    def wait(self, timeout_s: float) -> None:
        """Return when this process's bytes are written. Raises WaitTimeout, or what the write raised."""
        deadline = time.monotonic() + timeout_s
        for future in self.futures:
            try:
                future.result(timeout=max(0.001, deadline - time.monotonic()))
            except TimeoutError as error:
                raise WaitTimeout(f"this process's array writes did not finish within {timeout_s:g} s") from error


def _host_local(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1


def _stored_form(leaf: LeafSpec, value: Any) -> Any:
    """What Orbax is given for a leaf: None where it cannot or need not hold it."""
    if leaf.kind in ("none", "empty"):
        return value
    if leaf.kind in ("bool", "int", "float", "str"):
        return value if leaf.kind != "int" or value in _INT64 else None
    if not leaf.in_store:
        return None
    if leaf.kind == "numpy_scalar":
        value = np.asarray(value)
    if _host_local(value):  # Orbax refuses these; process 0's copy is the one that is stored
        value = np.asarray(jax.random.key_data(value) if leaf.kind == "key" else value)
    if leaf.kind != "key" and leaf.stored_dtype:
        stored = np.dtype(getattr(ml_dtypes, leaf.stored_dtype, leaf.stored_dtype))
        return value.view(stored) if isinstance(value, np.ndarray) else _bitcast(value, stored)
    return value


def _bitcast(value: jax.Array, dtype: np.dtype[Any]) -> Any:
    return jax.jit(lambda x: jax.lax.bitcast_convert_type(x, dtype), out_shardings=value.sharding)(value)


def _boxes(leaf: LeafSpec, value: Any, process: int) -> tuple[Box, ...]:
    shape = leaf.stored_shape if leaf.stored_shape is not None else leaf.shape
    if not isinstance(value, jax.Array) or _host_local(value):
        return (Box(start=(0,) * len(shape), stop=tuple(shape)),) if process == 0 else ()
    return tuple(_box(shard.index, shape) for shard in value.addressable_shards if shard.replica_id == 0)


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """A shard's index as a box; dimensions beyond the index (of key data) are whole."""
    full = (*index, *(slice(None),) * (len(shape) - len(index)))
    bounds = [part.indices(size) for part, size in zip(full, shape, strict=True)]
    return Box(start=tuple(bound[0] for bound in bounds), stop=tuple(bound[1] for bound in bounds))


@dataclass(frozen=True)
class Load:
    """One leaf to read: where to (`sharding` None means numpy on the host) and as what dtype (None: as saved)."""

    leaf: LeafSpec
    sharding: jax.sharding.Sharding | None = None
    dtype: Any = None


def load(directory: str, loads: Sequence[Load], on_bytes: Callable[[int], None] | None = None) -> list[Any]:
    """Read leaves of the `state/` at URL `directory`, in order, concurrently; each process reads what it needs.

    Works on any mesh and process count. `on_bytes` is told of bytes as they arrive, for progress displays.
    Raises Damaged naming the leaf if it cannot be read.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}, "data_copy_concurrency": {"limit": 8}})
    kvstore = {"driver": "ocdbt", "base": directory.rstrip("/") + "/"}

    async def run() -> list[Any]:
        window = asyncio.Semaphore(_LOAD_CONCURRENCY)

        async def one(item: Load) -> Any:
            async with window:
                return await _load_leaf(kvstore, context, item, on_bytes)

        return list(await asyncio.gather(*(one(item) for item in loads)))

    return asyncio.run(run())


async def _load_leaf(kvstore: dict[str, Any], context: Any, item: Load, on_bytes: Callable[[int], None] | None) -> Any:
    leaf = item.leaf
    if not leaf.in_store:
        return _empty_array(item) if leaf.kind in ("array", "key", "numpy", "numpy_scalar") else inline_value(leaf)
    shape = leaf.stored_shape if leaf.stored_shape is not None else leaf.shape
    spec = {"driver": "zarr3", "kvstore": {**kvstore, "path": leaf.name + "/"}}
    try:
        store = await ts.open(spec, open=True, read=True, context=context)
        if tuple(store.shape) != tuple(shape):
            raise Damaged(f"{leaf.label}: the file holds shape {list(store.shape)}, the tree spec {list(shape)}")
        if item.sharding is None:
            whole = await store.read()
            return _on_host(item, whole, on_bytes)
        return await _load_sharded(store, item, tuple(shape), on_bytes)
    except (ValueError, OSError, NotImplementedError) as error:  # TensorStore's statuses arrive as these
        raise Damaged(f"{leaf.label}: cannot be read from {directory_of(kvstore)}: {error}") from error


def directory_of(kvstore: dict[str, Any]) -> str:
    return str(kvstore["base"])


def _on_host(item: Load, data: Any, on_bytes: Callable[[int], None] | None) -> Any:
    if on_bytes:
        on_bytes(data.nbytes)
    data = _logical(item, data)
    return data[()] if item.leaf.kind == "numpy_scalar" else data


def _logical(item: Load, data: Any) -> Any:
    """Stored bytes as the user's dtype, then cast if asked."""
    leaf = item.leaf
    if leaf.kind != "key" and leaf.stored_dtype:
        data = data.view(np.dtype(getattr(ml_dtypes, leaf.dtype, leaf.dtype)))
    return data if item.dtype is None or data.dtype == item.dtype else data.astype(item.dtype)


async def _load_sharded(store: Any, item: Load, shape: tuple[int, ...], on_bytes: Callable[[int], None] | None) -> Any:
    assert item.sharding is not None
    by_box: dict[Box, list[Any]] = {}
    for device, index in item.sharding.addressable_devices_indices_map(shape).items():
        by_box.setdefault(_box(index or (), shape), []).append(device)

    async def one(box: Box) -> Any:
        part = await store[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))].read()
        if on_bytes:
            on_bytes(part.nbytes)
        return _logical(item, part)

    parts: Awaitable[list[Any]] = asyncio.gather(*(one(box) for box in by_box))
    on_devices = [
        jax.device_put(part, device)
        for part, devices in zip(await parts, by_box.values(), strict=True)
        for device in devices
    ]
    array = jax.make_array_from_single_device_arrays(shape, item.sharding, on_devices)
    return jax.random.wrap_key_data(array, impl=item.leaf.value) if item.leaf.kind == "key" else array


def _empty_array(item: Load) -> Any:
    """An array with no elements, from its spec alone."""
    leaf = item.leaf
    dtype = item.dtype or (leaf.stored_dtype if leaf.kind == "key" else None) or leaf.dtype
    shape = leaf.stored_shape if leaf.stored_shape is not None else leaf.shape
    host = np.zeros(shape, np.dtype(getattr(ml_dtypes, str(dtype), dtype)))
    if item.sharding is None:
        return host
    array = jax.make_array_from_callback(tuple(shape), item.sharding, lambda index: host[index])
    return jax.random.wrap_key_data(array, impl=leaf.value) if leaf.kind == "key" else array


def default_sharding() -> jax.sharding.Sharding:
    """Where a target array without a sharding goes: this process's first device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def sharding_of(target: Any) -> jax.sharding.Sharding | None:
    """The sharding a target leaf asks for; None for numpy targets."""
    if isinstance(target, np.ndarray | np.generic):
        return None
    return getattr(target, "sharding", None) or default_sharding()


def own_files(process: int) -> tuple[str, ...]:
    """Prefixes below `state/` that process `process` writes alone (Orbax 0.12.8); the rest is the coordinator's."""
    return (f"ocdbt.process_{process}/", f"array_metadatas/process_{process}")

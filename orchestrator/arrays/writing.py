"""Writing pytrees as an ordinary Orbax checkpoint.

Writing goes through Orbax's handler layer (`PyTreeCheckpointHandler`), which contains no cross-process barrier, with a
type handler of ours that gets all leaves at once: it writes every chunk, with its checksum, through one OCDBT store per
process, instead of opening one TensorStore per leaf. Orbax writes its own metadata and merges the processes' stores, so
plain Orbax reads the result. Reading goes straight to the chunks, because Orbax needs a target or the topology of the
writer, and we know every leaf from the attempt's tree spec.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import math
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

# Private (orbax 0.12.8), as plain Orbax needs both files: `array_metadatas/` (which arrays are PRNG keys) and
# `_sharding` (restoring without a target). tests/test_private_apis.py watches them.
from orbax.checkpoint._src.metadata import array_metadata as _array_metadata
from orbax.checkpoint._src.metadata import array_metadata_store as _array_metadata_store
from orbax.checkpoint._src.metadata import sharding as _sharding_metadata

from orchestrator import chunks
from orchestrator.arrays import fingerprint
from orchestrator.arrays.store import context, store_spec
from orchestrator.errors import WaitTimeout
from orchestrator.records import Box, LeafSpec, ShardPrint
from orchestrator.tree import INT64, Flat, numpy_dtype

_WINDOW_BYTES = 256 << 20  # chunks handed to TensorStore and not yet durable
_FILE_BYTES = 64 << 20  # of one data file: several are written and fsynced at the same time
_TIMEOUT_S = 3600.0  # for opening; the save's own deadline is shorter and ends the wait before
_LOOK_S = 0.5  # how often a write looks whether it is still wanted
_CHECKSUM = {"name": "crc32c"}
_ZSTD = {"name": "zstd", "configuration": {"level": 1}}


@dataclass
class Staged:
    """One leaf on the host: what this process writes of it. `parts`: boxes on the chunk grid and their elements."""

    leaf: LeafSpec
    parts: deque[tuple[Box, np.ndarray[Any, Any]]]
    describes: bool  # whether this process writes the array's `zarr.json`
    sharding: jax.sharding.Sharding | None = None

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for _, data in self.parts)


# Orbax chooses the handler, and the type that its readers see, by the class of the leaf.
class _StagedArray(Staged):
    pass


class _StagedNumpy(Staged):
    pass


class _StagedScalar(Staged):
    pass


@dataclass
class _Underway:
    """What the handlers of one save share. `stop`: set, whoever writes gives up. `checksums`: of the chunks written.
    `written_bytes`: in the store, so far."""

    stop: threading.Event = field(default_factory=threading.Event)
    checksums: dict[str, str] = field(default_factory=dict)
    written_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wrote(self, count: int) -> None:
        with self.lock:  # the handlers write at the same time
            self.written_bytes += count


class WriteStopped(Exception):
    """A write was given up before its end, as it was asked to."""


class _MetadataStore(_array_metadata_store.Store):  # type: ignore[misc]  # Orbax is untyped here
    """Every process makes the directory that it writes to. In Orbax's own all but process 0 poll, every 0.25 s and for
    as long as the save may take, for process 0 to make it: it may have failed before."""

    def __init__(self) -> None:
        super().__init__(primary_host=None)

    def set_primary_host(self, primary_host: int | None) -> None:
        """What the handler is told of; not wanted here."""


class _BatchHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # Orbax is untyped here
    """Writes all leaves of one kind at once. Reading is not its business (`load`)."""

    def __init__(self, typestr: str, process: int, compression: bool, save: _Underway) -> None:
        self._typestr, self._process, self._compression, self._save = typestr, process, compression, save
        self._context = context()
        # Orbax looks here for the store of array metadata, as it does with its own handler.
        self._array_metadata_store = _MetadataStore() if typestr == "jax.Array" else None

    def typestr(self) -> str:
        return self._typestr

    async def serialize(self, values: Sequence[Staged], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Write `values` and wait until they are durable. Everything has been staged before; nothing is left over."""
        directory = infos[0].parent_dir
        # On a thread, and waiting there: thousands of small futures keep an event loop busy for longer than the disk.
        url = _as_url(directory)
        await asyncio.to_thread(_write, values, url, self._process, self._compression, self._context, self._save)
        if self._array_metadata_store:
            described = [_describe(value) for value in values]
            await self._array_metadata_store.write(directory, described, self._process)
            if self._process == 0:
                (directory / "_sharding").write_text(json.dumps(_shardings(values)))
        return ()

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise NotImplementedError("read with `load`, or with an Orbax of your own")

    async def metadata(self, infos: Any) -> Any:
        raise NotImplementedError("the tree spec of the attempt describes it")


def _as_url(directory: epath.Path) -> str:
    path = str(directory)
    return path if "://" in path else "file://" + path


def _write(
    values: Sequence[Staged], url: str, process: int, compression: bool, shared: ts.Context, save: _Underway
) -> None:
    config = {
        "max_inline_value_bytes": 1024,
        "max_decoded_node_bytes": 100_000_000,
        "manifest_kind": "single",
        "compression": None,
    }
    spec = store_spec(f"{url.rstrip('/')}/ocdbt.process_{process}")
    spec |= {"config": config, "assume_config": True, "target_data_file_size": _FILE_BYTES}
    store = ts.KvStore.open(spec, context=shared).result(timeout=_TIMEOUT_S)
    pending: deque[tuple[int, Any]] = deque()
    in_flight = 0
    for value in values:
        leaf = value.leaf
        assert leaf.chunk is not None
        if value.describes:
            body = chunks.metadata(_template(_stored_dtype(leaf), compression), leaf.file_shape, leaf.chunk)
            pending.append((len(body), store.write(chunks.metadata_key(leaf.name), body)))
        while value.parts:  # taken off as they go: TensorStore has its own copy
            box, data = value.parts.popleft()
            for chunk in chunks.cut(box, leaf.chunk):
                raw = data[chunks.within(chunk, box)].reshape(-1).view(np.uint8).data
                if compression:
                    raw = memoryview(_compressed(raw))
                key, checksum = chunks.key(leaf.name, chunk, leaf.chunk), crc32c.crc32c(raw)
                save.checksums[key] = f"{checksum:08x}"
                body = b"".join((raw, checksum.to_bytes(chunks.CHECKSUM_BYTES, "little")))
                pending.append((len(body), store.write(key, body)))
                in_flight += len(body)
                while in_flight > _WINDOW_BYTES:
                    size, future = pending.popleft()
                    _written(future, size, save)
                    in_flight -= size
    for size, future in pending:
        _written(future, size, save)


def _written(future: Any, size: int, save: _Underway) -> None:
    """Wait for one chunk. Raises WriteStopped soon after `save.stop` is set, and what the write raised."""
    while not save.stop.is_set():
        with contextlib.suppress(TimeoutError):
            future.result(timeout=_LOOK_S)
            save.wrote(size)
            return
    raise WriteStopped


def _compressed(raw: memoryview) -> bytes:
    """zstd by TensorStore's own codec: one array of bytes, one chunk, in memory."""
    spec = {
        "driver": "zarr3",
        "kvstore": "memory://",
        "metadata": {
            "data_type": "uint8",
            "shape": [len(raw)],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [len(raw)]}},
            "codecs": [{"name": "bytes"}, _ZSTD],
            "fill_value": 0,
        },
        "store_data_equal_to_fill_value": True,
    }
    array = ts.open(spec, create=True).result(timeout=_TIMEOUT_S)
    array.write(np.frombuffer(raw, np.uint8)).result(timeout=_TIMEOUT_S)
    store: Any = array.kvstore
    return bytes(store.read("c/0").result(timeout=_TIMEOUT_S).value)


@functools.lru_cache(maxsize=256)
def _template(dtype: str, compression: bool) -> dict[str, object]:
    """TensorStore's own `zarr.json` of an array of `dtype`, made in memory."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *([_ZSTD] if compression else []), _CHECKSUM]
    spec = {
        "driver": "zarr3",
        "kvstore": "memory://",
        "metadata": {"data_type": dtype, "shape": [1], "codecs": codecs},
    }
    store: Any = ts.open(spec, create=True).result(timeout=_TIMEOUT_S).kvstore
    return dict(json.loads(store.read("zarr.json").result(timeout=_TIMEOUT_S).value))


def _stored_dtype(leaf: LeafSpec) -> str:
    return leaf.stored_dtype or leaf.dtype


def _describe(value: Staged) -> Any:
    leaf = value.leaf
    extra = {_array_metadata.RANDOM_KEY_IMPL: leaf.value} if leaf.kind == "key" else None
    return _array_metadata.ArrayMetadata(
        param_name=leaf.name,
        shape=leaf.file_shape,
        dtype=numpy_dtype(_stored_dtype(leaf)),
        write_shape=leaf.chunk,
        chunk_shape=leaf.chunk,
        use_ocdbt=True,
        use_zarr3=True,
        ext_metadata=extra,
    )


def _shardings(values: Sequence[Staged]) -> dict[str, str]:
    """Orbax's `_sharding` file: base64 of the leaf's name -> its sharding, as Orbax writes it."""

    @functools.cache
    def text(sharding: jax.sharding.Sharding) -> str | None:
        described = _sharding_metadata.from_jax_sharding(sharding)
        return described.to_serialized_string() if described else None

    names = ((value.leaf.name, text(value.sharding)) for value in values if value.sharding is not None)
    return {base64.b64encode(name.encode()).decode(): told for name, told in names if told}


@dataclass(frozen=True)
class ArrayOptions:
    """compression: zstd for each chunk (smaller, several times slower on a fast disk)."""

    compression: bool = False


class ArrayWriter:
    """Writes attempts' `state/` directories. `stage` on the main thread; the rest on any one thread at a time."""

    def __init__(self, options: ArrayOptions, process: int) -> None:
        self._save = _Underway()
        array, numpy, scalar = (
            _BatchHandler(typestr, process, options.compression, self._save)
            for typestr in ("jax.Array", "np.ndarray", "scalar")
        )
        registry = ocp.type_handlers.create_type_handler_registry(
            (_StagedArray, array),
            (_StagedNumpy, numpy),
            (_StagedScalar, scalar),
            (jax.Array, array),  # where Orbax looks for the store of array metadata
            (str, ocp.type_handlers.StringHandler()),
        )
        self._process = process
        self._compression = options.compression
        self._handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=registry
        )

    def stage(self, directory: str, flat: Flat, attest: bool = False) -> PendingWrite:
        """Take what is needed from the devices, for the attempt's `state/` at URL `directory`. `attest`: have the
        devices compute the fingerprints of their shards, too.

        When it returns, the caller may donate or overwrite every array of the tree: none of it can leak into the
        checkpoint. Copies from accelerators and out of numpy arrays; CPU arrays are held, not copied (JAX does not
        reuse a donated buffer that is held: tests/test_arrays.py).
        """
        for value in flat.values:  # all transfers under way before the first is waited for
            if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
                _start_transfer(value)
        places: _Places = {}
        staged = [
            _stage(leaf, value, self._process, places)
            for leaf, value in zip(flat.spec.leaves, flat.values, strict=True)
        ]
        boxes = {
            item.leaf.name: tuple(box for box, _ in item.parts)
            for item in staged
            if isinstance(item, _StagedArray | _StagedNumpy) and item.parts
        }
        tree = jax.tree_util.tree_unflatten(flat.treedef, staged)
        self._save.stop.clear()
        self._save.checksums = {}
        self._save.written_bytes = 0
        prints = fingerprint.start(self._attested(flat)) if attest else None
        return PendingWrite(self._handler, directory, tree, boxes, self._save, prints)

    def _attested(self, flat: Flat) -> Iterator[tuple[LeafSpec, Any]]:
        """The stored leaves, as far as this process answers for them: of what every host has its own of, process 0."""
        for leaf, value in zip(flat.spec.leaves, flat.values, strict=True):
            shared = isinstance(value, jax.Array) and not _host_local(value)
            if leaf.in_store and (shared or self._process == 0):
                yield leaf, value

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


# (sharding, shape) -> (index, box, replica id) of each addressable shard, and how many replicas each shard has.
_Places = dict[Any, tuple[list[tuple[int, Box, int]], int]]


class PendingWrite:
    """A staged state on its way to the store. `boxes`: leaf name -> regions that this process writes."""

    def __init__(
        self,
        handler: Any,
        directory: str,
        tree: Any,
        boxes: Mapping[str, tuple[Box, ...]],
        save: _Underway | None = None,
        prints: fingerprint.Prints | None = None,
    ) -> None:
        self._handler, self._directory, self._tree = handler, directory, tree
        self._save, self._prints = save or _Underway(), prints
        self.boxes = boxes

    @property
    def checksums(self) -> dict[str, str]:
        """Key -> CRC-32C, in hex, of each chunk that has been written. After `wait`, and until the next `stage`."""
        return self._save.checksums

    def fingerprints(self) -> dict[str, tuple[ShardPrint, ...]]:
        """Leaf name -> fingerprints of this process's shards; {} where none were asked for. Waits for the devices."""
        return self._prints.signed() if self._prints else {}

    @property
    def written_bytes(self) -> int:
        """How much of this process's arrays is in the store by now. Any thread; until the next `stage`."""
        return self._save.written_bytes

    def wait(self, timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Write; return when this process's bytes are in the store. Raises WaitTimeout, WriteStopped soon after
        `given_up` (asked now and then, on another thread) has said yes, or what the write raised."""
        tree, self._tree = self._tree, None

        async def write() -> None:
            arguments = ocp.args.PyTreeSave(tree)
            futures = await self._handler.async_save(_orbax_path(self._directory, make=True), args=arguments)
            for future in futures or ():
                await asyncio.to_thread(future.result, timeout_s)

        async def watch() -> None:
            while not await asyncio.to_thread(given_up):
                await asyncio.sleep(_LOOK_S)
            self._save.stop.set()

        async def both() -> None:
            watching = asyncio.create_task(watch())
            try:
                await asyncio.wait_for(write(), timeout_s)
            finally:
                watching.cancel()
                self._save.stop.set()  # asyncio waits for its threads: one that still writes must end, too

        try:
            asyncio.run(both())
        except TimeoutError as error:
            raise WaitTimeout(f"this process's array writes did not finish within {timeout_s:g} s") from error


def _start_transfer(value: jax.Array) -> None:
    device: Any = next(iter(value.sharding.device_set))
    if device.platform != "cpu":
        for index in range(len(value.sharding.addressable_devices)):
            value.addressable_data(index).copy_to_host_async()


def _host_local(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.is_fully_addressable and jax.process_count() > 1


def _stage(leaf: LeafSpec, value: Any, process: int, places: _Places) -> Any:
    """What Orbax is given for a leaf: a Staged, a string, an empty container; None where it need not hold it."""
    if leaf.kind in ("none", "empty", "str"):
        return value
    if leaf.kind in ("bool", "int", "float"):
        if leaf.kind == "int" and value not in INT64:
            return None
        data = np.asarray(value)
        inner = LeafSpec(path=leaf.path, kind="numpy", shape=(), dtype=data.dtype.name, chunk=())
        return _whole(_StagedScalar, inner, data, process)
    if not leaf.in_store:
        return None
    if leaf.kind == "key":
        value = jax.random.key_data(value)
    if not isinstance(value, jax.Array) or _host_local(value):  # process 0's copy is the one that is stored
        dtype = numpy_dtype(leaf.stored_dtype if leaf.kind == "key" else leaf.dtype)
        # A copy in native byte order: the caller may overwrite his array as soon as we return.
        return _whole(_StagedNumpy, leaf, np.array(value, dtype=dtype, order="C") if process == 0 else None, process)
    return _stage_shards(leaf, value, places)


def _whole(kind: type[Staged], leaf: LeafSpec, data: Any, process: int) -> Staged:
    shape = leaf.file_shape
    whole = Box(start=(0,) * len(shape), stop=shape)
    return kind(leaf, deque([(whole, data)] if process == 0 else []), describes=process == 0)


def _stage_shards(leaf: LeafSpec, value: jax.Array, places: _Places) -> Staged:
    """The chunks that this process writes: each chunk is written by one of the replicas that hold it, in turn, so that
    replicated arrays are spread evenly over their hosts."""
    assert leaf.chunk is not None
    shape = leaf.file_shape
    layout = places.get((value.sharding, shape))
    if layout is None:
        shards = value.addressable_shards
        where = [(index, chunks.box_of(shard.index, shape), shard.replica_id) for index, shard in enumerate(shards)]
        distinct = math.prod(shape) // math.prod(chunks.shape_of(where[0][1])) if where else 1
        layout = places[value.sharding, shape] = (where, max(1, len(value.sharding.device_set) // distinct))
    where, replicas = layout
    first = zlib.crc32(leaf.name.encode()) if replicas > 1 else 0
    parts: deque[tuple[Box, np.ndarray[Any, Any]]] = deque()
    for index, box, replica in where:
        if replicas == 1:
            parts.append((box, np.asarray(value.addressable_data(index))))
            continue
        mine = [chunk for turn, chunk in enumerate(chunks.cut(box, leaf.chunk)) if (first + turn) % replicas == replica]
        if mine:
            data = np.asarray(value.addressable_data(index))
            parts.extend((chunk, data[chunks.within(chunk, box)]) for chunk in mine)
    describes = any(not any(box.start) for box, _ in parts)
    return _StagedArray(leaf, parts, describes, value.sharding)


def own_files(process: int) -> tuple[str, ...]:
    """Prefixes below `state/` that process `process` writes alone (Orbax 0.12.8); the rest is the coordinator's."""
    return (f"ocdbt.process_{process}/", f"array_metadatas/process_{process}")

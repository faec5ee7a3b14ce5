"""Writing pytrees as an ordinary Orbax checkpoint.

Each process writes all its chunks, with their checksums, to the data files of one OCDBT store of its own, several at
the same time, and then the store's tree (`ocdbt`) and Orbax's metadata (`orbax_files`). `finalize` lets TensorStore
merge the processes' stores into the one that readers open. Orbax's own handlers would do the same through one
TensorStore per leaf, with a copy of every chunk on the way: see docs/decisions/0008-write-ocdbt-directly.md.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import crc32c
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import tensorstore as ts

from orchestrator import chunks, garbage
from orchestrator.arrays import datafiles, fingerprint, ocdbt, orbax_files
from orchestrator.arrays.feed import Feed
from orchestrator.arrays.staging import Layouts, Staged, host_local, on_host, stage, start_transfer
from orchestrator.arrays.store import context, files_spec, report_retries, store_spec
from orchestrator.errors import StorageError, WaitTimeout
from orchestrator.records import Box, FileEntry, LeafSpec, ShardPrint, TreeSpec
from orchestrator.tree import Flat

_FILE_BYTES = 64 << 20  # of one data file; several are written, and later fsynced, at the same time
_THREADS = 4
MERGE_READS = 128  # at once, of an object store, while the processes' stores are merged
_THREAD_BYTES = 16 << 20  # a further thread for each of these
_TIMEOUT_S = 3600.0  # for opening; the save's own deadline is shorter and ends the wait before
_LOOK_S = 0.5  # how often a write looks whether it is still wanted
_SMALL_BYTES = ocdbt.INLINE_BYTES - chunks.CHECKSUM_BYTES
_CHECKSUM = {"name": "crc32c"}
_ZSTD = {"name": "zstd", "configuration": {"level": 1}}
_STORES = "ocdbt.process_"

Array = np.ndarray[Any, Any]


class WriteStopped(Exception):
    """A write was given up before its end, as it was asked to."""


@dataclass(frozen=True)
class ArrayOptions:
    """compression: zstd for each chunk (smaller, several times slower on a fast disk). host_bytes_max: how much of a
    state this process may hold that is not written yet; None: all of it. A larger one is refused (`skip_when_full`), or
    written while it is staged, for at most timeout_s.
    """

    compression: bool = False
    host_bytes_max: int | None = None
    skip_when_full: bool = False
    timeout_s: float = 600.0


class ArrayWriter:
    """Writes attempts' `state/` directories. `stage` on the main thread; the rest on any one thread at a time."""

    def __init__(self, options: ArrayOptions, process: int) -> None:
        self._process, self._options = process, options

    def recorded(self, spec: TreeSpec) -> TreeSpec:
        """The tree spec as readers need it: compressed chunks are not raw elements."""
        if not self._options.compression:
            return spec
        return TreeSpec(leaves=tuple(msgspec.structs.replace(leaf, chunk=None) for leaf in spec.leaves))

    def stage(self, directory: str, flat: Flat, attest: bool = False) -> PendingWrite:
        """Take what is needed from the devices, for the attempt's `state/` at URL `directory`. `attest`: have the
        devices compute the fingerprints of their shards, too.

        When it returns, the caller may donate or overwrite every array of the tree: none of it can leak into the
        checkpoint. Copies from accelerators and out of numpy arrays; CPU arrays are held, not copied (JAX does not
        reuse a donated buffer that is held: tests/test_arrays.py).
        """
        limit = self._options.host_bytes_max
        size = 0 if limit is None else sum(map(_host_bytes, flat.values))
        small = limit is None or size <= limit
        if not small and self._options.skip_when_full:
            raise StorageError(f"{size} bytes of the state are on this process, host_bytes_max is {limit}: skipped")
        prints = fingerprint.start(self._attested(flat)) if attest else None
        feed = Feed(None if small else limit)
        pending = PendingWrite(directory, flat.treedef, self._process, self._options.compression, feed, prints)
        try:
            self._stage(flat, pending, feed, None if small else time.monotonic() + self._options.timeout_s)
        except BaseException:
            pending.abandon()
            raise
        return pending

    def _stage(self, flat: Flat, pending: PendingWrite, feed: Feed, deadline: float | None) -> None:
        if deadline is not None:  # more than may be held: it is written while it is taken
            pending.begin(_THREADS)
        else:
            for value in flat.values:  # all transfers under way before the first is waited for
                if isinstance(value, jax.Array) and not on_host(value.sharding):
                    start_transfer(value)
        layouts: Layouts = {}
        staged = []
        for leaf, value in zip(flat.spec.leaves, flat.values, strict=True):
            if deadline is not None:
                feed.wait_for_room(_host_bytes(value), deadline)
            item = stage(leaf, value, self._process, layouts)
            staged.append(item)
            pending.add(item)
        pending.staged(staged)

    def _attested(self, flat: Flat) -> Iterator[tuple[LeafSpec, Any]]:
        """The stored leaves, as far as this process answers for them: of what every host has its own of, process 0."""
        for leaf, value in zip(flat.spec.leaves, flat.values, strict=True):
            shared = isinstance(value, jax.Array) and not host_local(value)
            if leaf.in_store and (shared or self._process == 0):
                yield leaf, value

    def finalize(self, directory: str) -> None:
        """Merge the processes' OCDBT stores into one. Called by one process when all have written."""
        # Whoever seals the files makes them durable. Two small reads for each process: many at once.
        limits = {"file_io_sync": False, "gcs_request_concurrency": {"limit": MERGE_READS}}
        shared = ts.Context(limits, parent=context())
        files = ts.KvStore.open(files_spec(directory), context=shared).result(timeout=_TIMEOUT_S)
        listed = files.list(ts.KvStore.KeyRange(_STORES, _STORES + "~")).result(timeout=_TIMEOUT_S)
        stores = [
            name.decode().partition("/")[0] for name in listed if name.decode().partition("/")[2] == ocdbt.MANIFEST
        ]
        if not stores:
            return
        merged = ts.KvStore.open(_merged_spec(directory), context=shared).result(timeout=_TIMEOUT_S)
        transaction = ts.Transaction(atomic=True)
        copies = []
        for name in stores:
            store = ts.KvStore.open(store_spec(f"{directory.rstrip('/')}/{name}"), context=shared)
            target = merged.with_transaction(transaction)
            copies.append(store.result(timeout=_TIMEOUT_S).experimental_copy_range_to(target))
        for copied in copies:
            copied.result(timeout=_TIMEOUT_S)
        transaction.commit_async().result(timeout=_TIMEOUT_S)
        report_retries(directory)

    def close(self) -> None:
        """Nothing is held between saves."""


def _merged_spec(directory: str) -> dict[str, Any]:
    config = {
        "max_inline_value_bytes": ocdbt.INLINE_BYTES,
        "max_decoded_node_bytes": 100_000_000,
        "manifest_kind": "single",
        "compression": None,
    }
    return store_spec(directory) | {"config": config, "assume_config": True}


# Writing.


@dataclass
class _Progress:
    """What the threads of one write share."""

    stop: threading.Event = field(default_factory=threading.Event)
    checksums: dict[str, str] = field(default_factory=dict)
    entries: list[tuple[bytes, ocdbt.Value]] = field(default_factory=list)
    files: list[datafiles.DataFile] = field(default_factory=list)


class PendingWrite:
    """A staged state on its way to the store. `boxes`: leaf name -> regions that this process writes."""

    def __init__(
        self,
        directory: str,
        treedef: Any,
        process: int,
        compression: bool,
        feed: Feed,
        prints: fingerprint.Prints | None,
    ) -> None:
        self._directory, self._treedef = directory.rstrip("/"), treedef
        self._process, self._compression, self._prints = process, compression, prints
        self._feed, self._progress = feed, _Progress()
        self._pool = ThreadPoolExecutor(_THREADS + 1, thread_name_prefix="write")
        self._running: list[Future[None]] = []
        self._staged: Sequence[Staged] = ()
        self._bytes = self._chunks = 0
        self._files: dict[str, datafiles.DataFile] = {}
        self.boxes: Mapping[str, tuple[Box, ...]] = {}

    # For the writer, while it stages.

    def begin(self, threads: int) -> None:
        """Write what is added from now on."""
        opened = datafiles.opener(f"{self._directory}/{_STORES}{self._process}")
        work = functools.partial(_work, self._feed, opened, self._progress, self._compression)
        self._running = [self._pool.submit(work) for _ in range(threads)]

    def add(self, item: Staged) -> None:
        self._bytes += sum(data.nbytes for data, _ in item.parts)
        self._chunks += sum(len(pieces) for _, pieces in item.parts)
        self._feed.add(item)

    def staged(self, staged: Sequence[Staged]) -> None:
        """All has been added."""
        self._feed.end()
        self._staged = staged
        self.boxes = {item.leaf.name: item.boxes for item in staged if item.leaf.in_store and item.boxes}

    def abandon(self) -> None:
        """End the threads, if any: it will not be waited for."""
        self._progress.stop.set()
        self._feed.end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def checksums(self) -> dict[str, str]:
        """Key -> CRC-32C, in hex, of each chunk that has been written. After `wait`."""
        return self._progress.checksums

    def fingerprints(self) -> dict[str, tuple[ShardPrint, ...]]:
        """Leaf name -> fingerprints of this process's shards; {} where none were asked for. Waits for the devices."""
        return self._prints.signed() if self._prints else {}

    @property
    def written_bytes(self) -> int:
        """How much of this process's arrays has been written by now. Any thread."""
        return sum(file.bytes for file in list(self._progress.files))

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that this process has written below `state/`, not durable yet on a file system. After `wait`."""
        return tuple(
            FileEntry(path=path, bytes=file.bytes, crc32c=f"{file.crc32c:08x}", crc32=file.crc32)
            for path, file in self._files.items()
        )

    def wait(self, timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Write; return when this process's bytes are in the store. Raises WaitTimeout, WriteStopped soon after
        `given_up` (asked at once and now and then) has said yes, or what the write raised."""
        deadline = time.monotonic() + timeout_s
        stop = self._progress.stop
        try:
            if not self._running:
                self.begin(min(_THREADS, 1 + self._bytes // _THREAD_BYTES))
            described = [item.leaf for item in self._staged if item.describes]
            more = [self._pool.submit(self._write_metadata), self._pool.submit(self._describe, described)]
            _watch([*self._running, *more], deadline, given_up, stop, timeout_s)
            _watch([self._pool.submit(self._write_tree)], deadline, given_up, stop, timeout_s)
        finally:
            self.abandon()
            report_retries(self._directory)

    def _write_metadata(self) -> None:
        """Orbax's own files; each process describes the arrays, process 0 the tree."""
        with garbage.paused():
            self._write_orbax_files(self._staged)

    def _write_orbax_files(self, staged: Sequence[Staged]) -> None:
        opened = datafiles.opener(self._directory)
        arrays = [item for item in staged if item.type == "jax.Array"]
        if arrays:
            body = orbax_files.array_metadatas(item.leaf for item in arrays)
            path = f"array_metadatas/process_{self._process}"
            self._files[path] = datafiles.write_file(opened, path, body)
        if self._process:
            return
        leaves = [item.leaf for item in staged]
        written = {"_METADATA": orbax_files.tree_metadata(leaves, self._treedef, [item.type for item in staged])}
        if arrays:
            named = ((item.leaf.name, item.sharding) for item in arrays if item.sharding is not None)
            written["_sharding"] = orbax_files.shardings(named)
        texts = [(item.leaf.name, item.text) for item in staged if item.text is not None]
        if texts:
            written["_strings.json"] = orbax_files.strings(texts)
        for path, body in written.items():
            self._files[path] = datafiles.write_file(opened, path, body)

    def _describe(self, leaves: Iterable[LeafSpec]) -> None:
        with garbage.paused():
            self._progress.entries.extend(map(self._described, leaves))

    def _described(self, leaf: LeafSpec) -> tuple[bytes, bytes]:
        assert leaf.chunk is not None
        body = _zarr_json(leaf.stored_dtype or leaf.dtype, leaf.file_shape, leaf.chunk, self._compression)
        return chunks.metadata_key(leaf.name).encode(), body

    def _write_tree(self) -> None:
        """The store's tree and manifest, once all chunks have their places. The receipt promises all of them."""
        if len(self._progress.checksums) != self._chunks:
            raise StorageError(f"{len(self._progress.checksums)} of {self._chunks} chunks were written")
        with garbage.paused():
            self._write_nodes(sorted(self._progress.entries), f"{_STORES}{self._process}")

    def _write_nodes(self, entries: Sequence[tuple[bytes, ocdbt.Value]], store: str) -> None:
        if entries:
            opened = datafiles.opener(f"{self._directory}/{store}")
            path = datafiles.data_file_path()
            nodes, manifest = ocdbt.encode(entries, path, 0, uuid.uuid4().bytes, time.time_ns())
            self._progress.files += [
                datafiles.write_file(opened, path, nodes),
                datafiles.write_file(opened, ocdbt.MANIFEST, manifest),
            ]
        self._files |= {f"{store}/{file.path}": file for file in self._progress.files}


def _watch(
    running: Sequence[Future[None]],
    deadline: float,
    given_up: Callable[[], bool],
    stop: threading.Event,
    timeout_s: float,
) -> None:
    """Wait for all of `running`, bounded. Raises what one of them raised, WaitTimeout, WriteStopped."""
    while True:
        if given_up():
            stop.set()
            raise WriteStopped
        left_s = deadline - time.monotonic()
        done, waiting = wait(running, timeout=max(0.0, min(_LOOK_S, left_s)), return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if not waiting:
            return
        if left_s <= 0:
            raise WaitTimeout(f"this process's array writes did not finish within {timeout_s:g} s")


def _work(feed: Feed, opened: Callable[[str], datafiles.DataFile], progress: _Progress, compression: bool) -> None:
    """Write parts until there are no more: one thread, one data file at a time."""
    files = _Rotation(opened, progress)
    try:
        while not progress.stop.is_set() and (taken := feed.take()) is not None:
            leaf, (data, pieces) = taken
            del taken
            size = data.nbytes
            if size <= _SMALL_BYTES and len(pieces) == 1 and not compression:
                _put(files, progress, leaf.name + pieces[0][0], data.tobytes())
            else:
                for suffix, where in pieces:
                    raw = data[where].reshape(-1).view(np.uint8).data
                    _put(files, progress, leaf.name + suffix, _compressed(raw) if compression else raw)
                    if progress.stop.is_set():
                        break
            del data
            feed.written(size)
    except BaseException as error:
        files.close(whole=False)
        feed.end(error)
        raise
    files.close(whole=True)


class _Rotation:
    """A thread's data files, one after the other."""

    def __init__(self, opened: Callable[[str], datafiles.DataFile], progress: _Progress) -> None:
        self._opened, self._progress = opened, progress
        self._file: datafiles.DataFile | None = None

    def current(self) -> datafiles.DataFile:
        if self._file is None or self._file.bytes >= _FILE_BYTES:
            self.close(whole=True)
            self._file = self._opened(datafiles.data_file_path())
            self._progress.files.append(self._file)
        return self._file

    def close(self, *, whole: bool) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close(whole=whole)


def _put(files: _Rotation, progress: _Progress, key: str, raw: bytes | memoryview) -> None:
    """One chunk, with its checksum."""
    checksum = crc32c.crc32c(raw)
    tail = checksum.to_bytes(chunks.CHECKSUM_BYTES, "little")
    size = len(raw) + len(tail)
    progress.checksums[key] = f"{checksum:08x}"
    if size <= ocdbt.INLINE_BYTES:
        progress.entries.append((key.encode(), b"".join((raw, tail))))
        return
    file = files.current()
    whole = chunks.combined_crc32c(checksum, crc32c.crc32c(tail), len(tail))
    progress.entries.append((key.encode(), (file.path, file.append((raw, tail), whole), size)))


def _host_bytes(value: Any) -> int:
    """At most so much of a leaf is staged by this process."""
    if not isinstance(value, jax.Array):
        return int(getattr(value, "nbytes", 0))
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    shard = value.sharding.shard_shape(value.shape)
    return int(math.prod(shard) * value.dtype.itemsize * len(value.sharding.addressable_devices))


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


@functools.lru_cache(maxsize=4096)
def _zarr_json(dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...], compression: bool) -> bytes:
    return chunks.metadata(_template(dtype, compression), shape, chunk)


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

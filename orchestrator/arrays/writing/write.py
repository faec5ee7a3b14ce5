"""Writing pytrees as an ordinary Orbax checkpoint.

Each process writes its chunks, with their checksums, to data files of its own, several at the same time, and Orbax's
metadata. Chunks too small to be worth a place in a file stay in memory: they go with the receipt. From all receipts one
process then makes the tree that names every chunk (`merged_tree`). Orbax's own handlers would do the same through one
TensorStore per leaf, with a copy of every chunk on the way: see docs/decisions/0004-write-ocdbt-directly.md and
docs/decisions/0007-receipts-carry-the-tree.md.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import crc32c
import jax
import msgspec
import numpy as np

from orchestrator.arrays import fingerprint
from orchestrator.arrays.format import ocdbt, orbax_files
from orchestrator.arrays.format.compressed import deflated
from orchestrator.arrays.format.tensorstore_specs import report_retries
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.leaf_errors import about
from orchestrator.arrays.tree import Flat
from orchestrator.arrays.writing import data_files, merged_tree
from orchestrator.arrays.writing.own_copies import OwnCopies, Turns
from orchestrator.arrays.writing.own_copies import take as take_own
from orchestrator.arrays.writing.part_queue import PartQueue
from orchestrator.arrays.writing.snapshot import Snapshots
from orchestrator.arrays.writing.snapshot_feed import SnapshotFeed
from orchestrator.arrays.writing.staging import shards_to_write, start, take, take_small, to_host
from orchestrator.arrays.writing.warm_up import WarmUp
from orchestrator.arrays.writing.write_plan import LeafPlan, Plan, plan_of
from orchestrator.errors import StorageError, WaitTimeout
from orchestrator.rules import holders, zarr_chunks
from orchestrator.rules.chunk_index import Chunks
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.records import Box, FileEntry, Held, LeafSpec, Place, ShardFingerprint, TreeSpec

_FILE_BYTES = 64 << 20  # of one data file; several are written, and later fsynced, at the same time
_THREADS = 4
_THREAD_BYTES = 16 << 20  # a further thread for each of these
_POLL_S = 0.5  # how often a write polls whether it has been given up


class WriteStopped(Exception):
    """A write was given up before its end, as `given_up` asked for."""


@dataclass(frozen=True)
class ArrayOptions:
    """tiled: how `flatten` cuts the arrays. compression: zstd for each chunk (smaller, several times slower on a fast
    disk). host_bytes_max: how much of a state this process may hold that is not written yet; None: all of it. A larger
    one is rejected (`skip_when_full`), or written while it is staged, for at most timeout_s.
    compare_own: compute digests of leaves of which every process has its own copy. stage, stage_margin: as in Options.
    """

    tiled: bool = False
    compression: bool = False
    host_bytes_max: int | None = None
    skip_when_full: bool = False
    timeout_s: float = 600.0
    compare_own: bool = True
    stage: str = "auto"
    stage_margin: float = 0.1


class ArrayWriter:
    """Stages attempts' `state/` directories, on the main thread. What it returns may be used by one other thread."""

    def __init__(self, options: ArrayOptions, process: int) -> None:
        self._process, self._options, self._turns = process, options, Turns()
        self._warm_up = WarmUp(options.host_bytes_max, tiled=options.tiled)
        self._snapshots = Snapshots(options.stage, options.stage_margin, self._warm_up)

    def prepare(self, like: Any) -> None:
        """Get ready, on a thread of its own, to save states like this one: arrays, or jax.ShapeDtypeStruct with
        shardings. Nothing to do on CPU devices. Main thread."""
        if self._options.stage != "host" and not self._options.compression:
            self._warm_up.expect(like)

    def close(self, timeout_s: float) -> None:
        """Wait for what `prepare` has begun."""
        self._warm_up.wait(timeout_s)

    def recorded(self, spec: TreeSpec) -> TreeSpec:
        """The tree spec as readers need it: compressed chunks are not raw elements."""
        if not self._options.compression:
            return spec
        return TreeSpec(leaves=tuple(msgspec.structs.replace(leaf, chunk=None) for leaf in spec.leaves))

    @in_own_context
    def stage(
        self,
        directory: str,
        flat: Flat,
        attest: bool = False,
        held: tuple[Held, ...] = (),
        admit: Callable[[int], None] = lambda need: None,
    ) -> PendingWrite:
        """Take what is needed from the devices, for the attempt's `state/` at URL `directory`. `attest`: have the
        devices compute the fingerprints of their shards, too. `held`: who holds the leaves, by process 0's
        account; () in a job of one process. `admit`: told how many bytes this process will write, before anything is
        taken; what it raises is raised. Raises UsageError naming the leaves that are on other devices here.

        When it returns, the caller may donate or overwrite every array of the tree: none of it can leak into the
        checkpoint. Copies out of numpy arrays; CPU arrays are held, not copied (JAX does not reuse a donated buffer
        that is held: tests/arrays/writing/test_write.py). What is on accelerators is being copied
        (tests/arrays/test_accelerator.py).
        """
        limit = self._options.host_bytes_max
        size = 0 if limit is None else sum(map(_host_bytes, flat.spec.leaves, flat.values))
        small = limit is None or size <= limit
        if not small and self._options.skip_when_full:
            raise StorageError(f"{size} bytes of the state are on this process, host_bytes_max is {limit}: skipped")
        plan = plan_of(flat, self._process, self._options.compression, held)
        admit(plan.written_bytes)
        own = take_own(flat, plan, self._turns) if plan.own and self._options.compare_own else None
        pending = PendingWrite(directory, flat, plan, PartQueue(None if small else limit), own)
        try:
            pending.stage(flat.values, self._snapshots, None if small else time.monotonic() + self._options.timeout_s)
            if attest:
                pending.attest(self._attested(flat, plan))
        except BaseException:
            pending.stop()
            raise
        return pending

    def _attested(self, flat: Flat, plan: Plan) -> Iterator[tuple[LeafSpec, Any]]:
        """The stored leaves that this process fingerprints. Leaves of which every process has its own copy: process 0
        only."""
        runs: list[Held | None] = [*holders.each_of(plan.held)] or [None] * len(flat.values)
        for leaf, value, run in zip(flat.spec.leaves, flat.values, runs, strict=True):
            shared = isinstance(value, jax.Array) and (run is None or run.by is not None)
            if leaf.in_store and (shared or self._process == 0):
                yield leaf, value


# Writing.


@dataclass
class _Progress:
    """What the threads of one write share. `places`: key -> (data file, offset, bytes, CRC-32C)."""

    stop: threading.Event = field(default_factory=threading.Event)
    places: dict[str, tuple[data_files.DataFile, int, int, int]] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    files: list[data_files.DataFile] = field(default_factory=list)


class PendingWrite:
    """A staged state on its way to the store."""

    def __init__(
        self,
        directory: str,
        flat: Flat,
        plan: Plan,
        queue: PartQueue,
        own: OwnCopies | None = None,
    ) -> None:
        self._directory, self._plan, self._own = directory.rstrip("/"), plan, own
        self._prints: fingerprint.Fingerprints | None = None
        self._feed: SnapshotFeed | None = None
        # Elements of small leaves: those on the host, and those that accelerators still copy.
        self._small, self._coming = b"", list[Any]()
        self._strings = [(leaf.name, leaf.value) for leaf in flat.spec.leaves if leaf.kind == "str"]
        self._queue, self._progress = queue, _Progress()
        self._pool = ThreadPoolExecutor(_THREADS + 2, thread_name_prefix="write")
        self._running: list[Future[None]] = []
        self._files: dict[str, data_files.DataFile] = {}
        self._store = f"ocdbt.process_{plan.process}"

    def stage(self, values: Sequence[Any], snapshots: Snapshots, deadline: float | None) -> None:
        """For the writer: take all leaves. deadline (monotonic): given where the state exceeds the memory budget; then
        it is written while it is taken."""
        off_host = [(plan, values[number]) for number, plan in self._plan.off_host]
        self._feed = self._from_snapshot(off_host, snapshots)
        at_once = [] if self._feed else off_host[: None if deadline is None else len(self._plan.small_off_host)]
        started = iter(start(at_once))
        self._coming = [next(started) for _, plan in self._plan.small_off_host if not self._feed for _ in plan.shards]
        if deadline is not None:
            self._begin(_THREADS)
        for number, plan in self._plan.large:
            if plan.off_host and self._feed:
                continue
            if deadline is not None:
                self._queue.wait_for_room(_host_bytes(plan.leaf, values[number]), deadline)
            with about(plan.leaf):
                if plan.off_host:
                    copies = iter(start([(plan, values[number])])) if deadline is not None else started
                    parts = [(next(copies), pieces) for _, pieces in plan.shards]
                else:
                    parts = take(plan, values[number])
            self._queue.add(parts)
        self._small = take_small((plan, values[number]) for number, plan in self._plan.small_on_host)
        if not self._feed:
            self._queue.end()

    def _from_snapshot(self, leaves: Sequence[tuple[LeafPlan, Any]], snapshots: Snapshots) -> SnapshotFeed | None:
        """What brings `leaves` to the host later, from a copy of them on their devices; None where none was made."""
        shards = shards_to_write(leaves)
        snapshot = snapshots.take(self._plan, shards)
        limit = self._queue.limit_bytes
        # What goes straight to the host is all there at once.
        if snapshot is None or (limit is not None and snapshot.uncopied_bytes > limit):
            return None
        direct = to_host([shards[number] for number in snapshot.uncopied]) if snapshot.uncopied else []
        pieces = [pieces for plan, _ in leaves for _, pieces in plan.shards]
        self._queue.expect_more()
        return SnapshotFeed(snapshot, pieces, dict(zip(snapshot.uncopied, direct, strict=True)))

    def attest(self, leaves: Iterable[tuple[LeafSpec, Any]]) -> None:
        """For the writer, after `stage`: have fingerprints of these arrays computed, in the background if what is held
        of them allows it."""
        self._prints = fingerprint.start(leaves, self._feed.whole(self._plan) if self._feed else {})

    def _begin(self, threads: int) -> None:
        opened = data_files.opener(f"{self._directory}/{self._store}")
        work = functools.partial(_work, self._queue, opened, self._progress, self._plan.compression)
        self._running = [self._pool.submit(work) for _ in range(threads)]

    def stop(self) -> None:
        """Stop writing and end the threads, whether or not everything has been written. Does not wait for them."""
        self._progress.stop.set()
        self._queue.end()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # What it has done, for the receipt.

    @property
    def boxes(self) -> dict[str, tuple[Box, ...]]:
        """Leaf name -> regions that this process writes. Not to be changed: the same for all writes of a form."""
        return self._plan.boxes

    @property
    def small(self) -> dict[str, bytes]:
        """Key -> chunk (elements and CRC-32C) of the chunks that are in no file: the receipt carries them. After
        `finish`."""
        return self._progress.small

    def places(self, files: Sequence[FileEntry]) -> dict[str, Place]:
        """Key -> where in `files` (this process's, in the attempt) each other chunk is. After `finish`."""
        numbers = {entry.path.rpartition("/")[2]: number for number, entry in enumerate(files)}
        return {
            key: Place(file=numbers[file.path.rpartition("/")[2]], offset=offset, bytes=size, crc32c=f"{checksum:08x}")
            for key, (file, offset, size, checksum) in self._progress.places.items()
        }

    def fingerprints(self) -> dict[str, tuple[ShardFingerprint, ...]]:
        """Leaf name -> fingerprints of this process's shards; {} where none were asked for. Waits for the devices."""
        return self._prints.signed() if self._prints else {}

    @property
    def went_by(self) -> str:
        """The name of the account of who holds the leaves that this process has used."""
        return holders.name(self._plan.held)

    @functools.cached_property
    def own(self) -> bytes:
        """For the receipt: digests of leaves of which every process has its own copy; b"" where nothing is compared."""
        own, self._own = self._own, None
        return own.result() if own else b""

    @property
    def written_bytes(self) -> int:
        """Bytes of this process's arrays that have been written so far, or wait for the receipt. Any thread."""
        small = sum(map(len, list(self._progress.small.values())))
        return small + sum(file.bytes for file in list(self._progress.files))

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that this process has written below `state/`, not yet durable on a file system. After `finish`."""
        return tuple(data_files.entry(path, file) for path, file in self._files.items())

    # Writing.

    def finish(self, timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Run the write to its end, starting the threads if `stage` has not: then this process's bytes are in the
        store. Raises WaitTimeout; WriteStopped soon after `given_up` (polled) returns True; or what the write
        raised."""
        deadline = time.monotonic() + timeout_s
        stop = self._progress.stop
        try:
            size = self._queue.waiting_bytes + (self._feed.large_bytes if self._feed else 0)
            beside = [self._pool.submit(self._beside, deadline)] if self._feed or self._prints else []
            if not self._running and size:
                self._begin(min(_THREADS, 1 + size // _THREAD_BYTES))
            rest = self._pool.submit(self._write_rest)
            _watch([*beside, *self._running, rest], deadline, given_up, stop, timeout_s)
        finally:
            self.stop()
            report_retries(self._directory)
        self._files |= {f"{self._store}/{file.path}": file for file in self._progress.files}
        written = len(self._progress.places) + len(self._progress.small)
        if written != self._plan.chunk_count:  # the receipt promises all of them
            raise StorageError(f"{written} of {self._plan.chunk_count} chunks were written")

    def _beside(self, deadline: float) -> None:
        if self._prints:  # first: the snapshot's arrays are deleted as they arrive on the host
            self._prints.launch()
        if self._feed:
            self._feed.run(self._queue, self._progress.stop, deadline)

    @in_own_context
    def _write_rest(self) -> None:
        coming = self._feed.small() if self._feed else b"".join(np.asarray(copy).tobytes() for copy in self._coming)
        small, first = self._small + coming, 0
        self._small, self._coming = b"", []
        for key, size in self._plan.small_chunks:
            raw = small[first : first + size]
            first += size
            self._progress.small[key] = raw + crc32c.crc32c(raw).to_bytes(zarr_chunks.CHECKSUM_BYTES, "little")
        opened = data_files.opener(self._directory)
        bodies = dict(self._plan.orbax_files)
        if self._strings and self._plan.process == 0:
            bodies["_strings.json"] = orbax_files.strings(self._strings)
        self._files |= data_files.write_files(opened, bodies)

    def merge(self, entries: Chunks) -> tuple[FileEntry, ...]:
        """Write the tree that readers open, of all processes' chunks: key -> the chunk, or its place below `state/`.
        Called by one process when all have written. Returns its files, not durable yet. Raises Damaged if `entries` are
        not what the state's arrays consist of, StorageError."""
        return merged_tree.write_tree(self._directory, self._plan, entries)


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
        done, waiting = wait(running, timeout=max(0.0, min(_POLL_S, left_s)), return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if not waiting:
            return
        if left_s <= 0:
            raise WaitTimeout(f"this process's array writes did not finish within {timeout_s:g} s")


@in_own_context
def _work(
    queue: PartQueue, opened: Callable[[str], data_files.DataFile], progress: _Progress, compression: bool
) -> None:
    """Write parts until there are no more: one thread, one data file at a time."""
    files = _Rotation(opened, progress)
    try:
        while not progress.stop.is_set() and (taken := queue.take()) is not None:
            copy, pieces = taken
            try:
                data = np.asarray(copy)  # what an accelerator copies is waited for here
            except RuntimeError as error:
                raise StorageError(f"{pieces[0][0]}: cannot be copied from its device: {error}") from error
            del taken, copy
            for key, where in pieces:
                raw = data[where].reshape(-1).view(np.uint8).data
                _put(files, progress, key, deflated(raw) if compression else raw, compression)
                if progress.stop.is_set():
                    break
            size = data.nbytes
            del data, raw
            queue.written(size)
    except BaseException as error:
        files.close(whole=False)
        queue.end(error)
        raise
    files.close(whole=True)


class _Rotation:
    """A thread's data files, one after the other."""

    def __init__(self, opened: Callable[[str], data_files.DataFile], progress: _Progress) -> None:
        self._opened, self._progress = opened, progress
        self._file: data_files.DataFile | None = None

    def current(self) -> data_files.DataFile:
        if self._file is None or self._file.bytes >= _FILE_BYTES:
            self.close(whole=True)
            self._file = self._opened(data_files.data_file_path())
            self._progress.files.append(self._file)
        return self._file

    def close(self, *, whole: bool) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close(whole=whole)


def _put(files: _Rotation, progress: _Progress, key: str, raw: bytes | memoryview, compressed: bool) -> None:
    """One chunk, with its checksum and, of elements as they are, those of its parts."""
    raw_view = memoryview(raw)
    parts = [] if compressed else [crc32c.crc32c(raw_view[first:end]) for first, end in zarr_chunks.parts(len(raw))]
    checksum = zarr_chunks.joined_crc32c(parts, len(raw)) if parts else crc32c.crc32c(raw)
    tail = checksum.to_bytes(zarr_chunks.CHECKSUM_BYTES, "little")
    size = len(raw) + len(tail)
    if size <= ocdbt.INLINE_BYTES:
        progress.small[key] = b"".join((raw, tail))
        return
    file = files.current()
    tail += b"".join([part.to_bytes(zarr_chunks.CHECKSUM_BYTES, "little") for part in parts])
    whole = zarr_chunks.combined_crc32c(checksum, crc32c.crc32c(tail), len(tail))
    progress.places[key] = (file, file.append((raw, tail), whole), size, checksum)


def _host_bytes(leaf: LeafSpec, value: Any) -> int:
    """Upper bound of what this process stages of a leaf."""
    if not isinstance(value, jax.Array):
        return int(getattr(value, "nbytes", 0))
    shard = value.sharding.shard_shape(leaf.shape)
    key_words = leaf.file_shape[len(leaf.shape) :]
    item_bytes = ITEM_BYTES[leaf.stored_dtype or leaf.dtype]
    return math.prod((*shard, *key_words)) * item_bytes * len(value.sharding.addressable_devices)

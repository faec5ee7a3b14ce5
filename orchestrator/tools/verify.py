"""Reading a committed attempt back, whole or in part, and reporting what is damaged: which file, array and shard.

Needs no devices and no target. Every file is compared with the manifest, then every chunk, which also tells another
save's data files from this one's (their own checksums cannot).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from orchestrator.arrays import ReadRequest
from orchestrator.errors import Damaged, OrchestratorError, StepRetired
from orchestrator.rules import chunk_index, journal, keys, zarr_chunks
from orchestrator.rules.boxes import box_label, whole_box
from orchestrator.rules.records import FileEntry, LeafSpec, LiveStep, Manifest
from orchestrator.run import checked_reads, stored_arrays
from orchestrator.run.journal_store import JournalStore

_THREADS = 4  # each holds one file in memory
_REASON_MAX = 1000  # characters of what the journal says of a quarantined step
_DATA = "/d/"  # OCDBT keeps an array store's bytes in such directories

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Verdict:
    """What reading an attempt back has found. `damaged`: what is proven not to be what was saved. `unread`: what could
    not be read, which proves nothing about the data. One line each. `retired`: where retention was quicker, there is
    nothing to report. `whole`: everything was read, not a sample. `files`, `chunks`: how many were compared."""

    damaged: tuple[str, ...]
    unread: tuple[str, ...]
    retired: str
    files: int
    chunks: int
    whole: bool

    @property
    def good(self) -> bool:
        return not self.damaged and not self.unread and not self.retired


def read_back(
    store: JournalStore,
    live: LiveStep,
    *,
    sample: float | None = None,
    seed: int = 0,
    by_store: bool = False,
    on_bytes: OnBytes = lambda read_bytes: None,
) -> Verdict:
    """Compare what is stored with what was saved. `sample`: of the arrays, only this fraction of the chunks (at least
    one), chosen by `seed`; records, sizes and process states are always read. `by_store`: the size and checksum that
    the store itself reports of each file are compared, and no chunk is read. Any thread."""
    whole = sample is None and not by_store
    reading = _ReadBack(store, live, on_bytes, twice=whole)
    manifest = reading.manifest(with_sizes=not whole)
    if manifest is None:
        return reading.verdict(whole)
    if by_store:
        reading.files(lambda entry: reading.stored.check_measured([entry]), manifest.files)
        return reading.verdict(whole)
    reading.files(
        reading.stored.checked, [entry for entry in manifest.files if sample is None or _DATA not in entry.path]
    )
    sizes = reading.records(manifest, decode=sample is None) if reading.is_good else {}
    chunk_keys = sorted(manifest.chunks)
    if sample is not None and chunk_keys:
        count = max(1, min(len(chunk_keys), math.ceil(len(chunk_keys) * sample)))
        chunk_keys = random.Random(seed).sample(chunk_keys, count)
    if chunk_keys and not reading.is_retired:
        reading.chunks(manifest, {key: sizes.get(key) for key in chunk_keys})
    return reading.verdict(whole)


def total_bytes(manifest: Manifest, sample: float | None = None) -> int:
    """About how much `on_bytes` of `read_back` adds up to: what the step holds, though its data is read twice, as files
    and as chunks. Each reading counts half."""
    data = sum(entry.bytes for entry in manifest.files if _DATA in entry.path)
    return manifest.total_bytes if sample is None else manifest.total_bytes - data + math.ceil(data * sample)


def record(store: JournalStore, live: LiveStep, verdict: Verdict) -> None:
    """Journal the verdict: a good attempt read whole is `verified`, and released if it was quarantined as damaged (not
    if by hand); a damaged one is quarantined. One that was retired while it was read stays as it is. Raises
    StorageError."""
    if verdict.damaged:
        reason = f"verify: {verdict.damaged[0]}"[:_REASON_MAX]
        store.append(partial(journal.quarantine, attempt=live.id, reason=reason))
    elif verdict.good and verdict.whole:
        if not live.restorable:
            why = "verify: read whole, and as it was saved"
            release = partial(journal.release, step=live.step, attempt=live.attempt, reason=why, disproved=True)
            store.append(release)
        store.append(partial(journal.trusted, attempt=live.id, trust="verified"))


class _ReadBack:
    """One attempt being read back. What is found is collected, not raised: each method goes as far as it can."""

    def __init__(self, store: JournalStore, live: LiveStep, on_bytes: OnBytes, *, twice: bool) -> None:
        self.stored, self._on_bytes, self._twice = store.step(live), on_bytes, twice
        self._damaged: list[str] = []
        self._unread: list[str] = []
        self._retired = ""
        self._files = self._chunks = 0

    @property
    def is_good(self) -> bool:
        """So far."""
        return not self._damaged and not self._unread and not self._retired

    @property
    def is_retired(self) -> bool:
        return bool(self._retired)

    def verdict(self, whole: bool) -> Verdict:
        damaged, unread = tuple(self._damaged), tuple(self._unread)
        return Verdict(damaged, unread, self._retired, files=self._files, chunks=self._chunks, whole=whole)

    def manifest(self, *, with_sizes: bool) -> Manifest | None:
        """None if it cannot be used. `with_sizes`: every file of it must be there, in its size."""
        try:
            manifest = self.stored.manifest
            if with_sizes:
                self.stored.check_sizes()
        except OrchestratorError as error:
            self._collect(error)
            return None
        return manifest

    def files(self, check: Callable[[FileEntry], object], entries: Sequence[FileEntry]) -> None:
        """Have `check` compare each file with its entry of the manifest, some of them at a time."""

        def read(entry: FileEntry) -> OrchestratorError | None:
            try:
                check(entry)
            except OrchestratorError as error:
                return error
            self._on_bytes(entry.bytes // 2 if self._twice and _DATA in entry.path else entry.bytes)
            return None

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
            for error in pool.map(read, entries):
                if error:
                    self._collect(error)
        self._files = len(entries)

    def records(self, manifest: Manifest, *, decode: bool) -> dict[str, int]:
        """Read what every record holds: a checksum that is right proves nothing about what is in it. And the tree must
        have the arrays that the manifest has chunks of, so that a restore reads what is checked here. `decode`: arrays
        whose chunks only their own metadata describes (compressed, external) are read whole. Returns the size of each
        chunk that the tree describes."""
        try:
            _ = self.stored.extra
            for name in (entry.path for entry in manifest.files):
                if name.startswith(keys.RECEIPTS):
                    checked_reads.receipts(self.stored.storage, self.stored.id, name)
                elif name.startswith(keys.PROCESS):
                    keys.process_of(name)
            leaves = self.stored.intent.tree.leaves
            for leaf in leaves if decode else ():
                if leaf.in_store and leaf.chunk is None:
                    stored_arrays.load(self.stored, [ReadRequest(leaf)])
        except OrchestratorError as error:
            self._collect(error)
            return {}
        sizes = chunk_index.sizes(leaves)
        missing = sorted(sizes.keys() - manifest.chunks.keys()) if manifest.chunks else []
        if missing:
            where = self.stored.url_of(keys.MANIFEST)
            self._damaged.append(f"{where}: lacks {len(missing)} chunks of the tree's arrays: {missing[:3]}")
        return sizes

    def chunks(self, manifest: Manifest, sizes: Mapping[str, int | None]) -> None:
        """Compare these chunks, of these sizes where they are known, with the manifest."""
        try:
            self.stored.check_sizes()
            count = (lambda read_bytes: self._on_bytes(read_bytes // 2)) if self._twice else self._on_bytes
            bad = stored_arrays.bad_chunks(self.stored, sizes, count)
        except OrchestratorError as error:
            self._collect(error)
            return
        self._chunks = len(sizes)
        labels = self._labels(manifest, bad.keys()) if bad else {}
        self._damaged += [f"{labels.get(key, key)}: {problem}" for key, problem in bad.items()]

    def _labels(self, manifest: Manifest, chunk_keys: Set[str]) -> dict[str, str]:
        """For people: which region of which array a chunk is, and who wrote it, as far as the records can be read."""
        writers: dict[str, str] = {}
        regions: dict[str, str] = {}
        try:
            for receipt in self.stored.receipts():
                for key in chunk_keys & {*receipt.places, *receipt.small}:
                    writers[key] = f" of process {receipt.process} ({receipt.host})"
            for leaf in self.stored.intent.tree.leaves:
                regions |= _regions(leaf, chunk_keys)
        except OrchestratorError:
            pass  # the damage that keeps us from reading them is among the findings already
        return {key: regions.get(key, key) + writers.get(key, "") for key in chunk_keys}

    def _collect(self, error: OrchestratorError) -> None:
        if isinstance(error, StepRetired):
            self._retired = str(error)
        else:
            (self._damaged if isinstance(error, Damaged) else self._unread).append(str(error))


def _regions(leaf: LeafSpec, chunk_keys: Set[str]) -> dict[str, str]:
    """Of these chunks, those of one array: which region of it each is."""
    if not leaf.in_store or leaf.chunk is None:
        return {}
    whole = whole_box(leaf.file_shape)
    boxes = ((zarr_chunks.key(leaf.name, box, leaf.chunk), box) for box in zarr_chunks.cut(whole, leaf.chunk))
    return {key: leaf.label + box_label(box) for key, box in boxes if key in chunk_keys}

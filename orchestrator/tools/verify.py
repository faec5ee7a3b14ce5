"""Reading a committed attempt back, whole or in part, and saying what is damaged: which file, array and shard.

Needs no devices and no target. Every file is compared with the manifest, then every chunk, which also tells another
save's data files from this one's (their own checksums cannot).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from orchestrator.arrays import ReadRequest
from orchestrator.errors import Damaged, OrchestratorError, StepRetired
from orchestrator.rules import chunk_index, fingerprints, journal, zarr_chunks
from orchestrator.rules import keys as layout
from orchestrator.rules.records import Box, FileEntry, LeafSpec, LiveStep, Manifest
from orchestrator.run.journal_store import Catalog
from orchestrator.run.stored_step import StoredStep

_THREADS = 4  # each holds one file in memory
_DATA = "/d/"  # OCDBT keeps an array store's bytes in such directories

OnBytes = Callable[[int], None]


@dataclass
class Verdict:
    """What reading an attempt back has found. `damaged`: is proven not to be what was saved. `unread`: could not be
    read, which says nothing about the data. One line each. `retired`: retention was quicker, there is nothing to say.
    `whole`: everything was read, not a sample."""

    damaged: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    retired: str = ""
    files: int = 0
    chunks: int = 0
    whole: bool = True

    @property
    def good(self) -> bool:
        return not self.damaged and not self.unread and not self.retired

    def note(self, error: OrchestratorError) -> None:
        if isinstance(error, StepRetired):
            self.retired = str(error)
        else:
            (self.damaged if isinstance(error, Damaged) else self.unread).append(str(error))


def read_back(
    catalog: Catalog,
    live: LiveStep,
    *,
    sample: float | None = None,
    seed: int = 0,
    by_store: bool = False,
    on_bytes: OnBytes = lambda read_bytes: None,
) -> Verdict:
    """Compare what is stored with what was saved. `sample`: of the arrays, only this fraction of the chunks (at least
    one), chosen by `seed`; records, sizes and process states are always looked at. `by_store`: the store's own word for
    size and checksum of every file is taken, and no chunk is read. Any thread."""
    verdict = Verdict(whole=sample is None and not by_store)
    stored = StoredStep(catalog, live)
    try:
        manifest = stored.listed
        if not verdict.whole:
            catalog.check_sizes(live, manifest)
    except OrchestratorError as error:
        verdict.note(error)
        return verdict
    if by_store:
        _read_files(catalog.measured, live, list(manifest.files), verdict, on_bytes)
        return verdict
    files = [entry for entry in manifest.files if sample is None or _DATA not in entry.path]
    _read_files(catalog.checked, live, files, verdict, on_bytes)
    sizes = _read_records(stored, manifest, verdict, decode=sample is None) if verdict.good else {}
    keys = sorted(manifest.chunks)
    if sample is not None and keys:
        keys = random.Random(seed).sample(keys, max(1, min(len(keys), math.ceil(len(keys) * sample))))
    if keys and not verdict.retired:
        _read_chunks(stored, {key: sizes.get(key) for key in keys}, verdict, on_bytes)
    return verdict


def total_bytes(manifest: Manifest, sample: float | None = None) -> int:
    """About how much `read_back` will read: each data file once as a file and once as chunks."""
    data = sum(entry.bytes for entry in manifest.files if _DATA in entry.path)
    return manifest.total_bytes + data if sample is None else manifest.total_bytes - data + math.ceil(data * sample)


def record(catalog: Catalog, live: LiveStep, verdict: Verdict) -> None:
    """Journal the verdict: a good attempt read whole is `verified`, and released if it was quarantined as damaged (not
    if by hand); a damaged one is quarantined. One that was retired while it was read stays as it is. Raises
    StorageError."""
    if verdict.damaged:
        reason = f"verify: {verdict.damaged[0]}"[:1000]
        catalog.append(partial(journal.quarantine, attempt=live.id, reason=reason))
    elif verdict.good and verdict.whole:
        if not live.restorable:
            why = "verify: read whole, and as it was saved"
            release = partial(journal.release, step=live.step, attempt=live.attempt, reason=why, disproved=True)
            catalog.append(release)
        catalog.append(partial(journal.trusted, attempt=live.id, trust="verified"))


def _read_files(
    check: Callable[[LiveStep, FileEntry], object],
    live: LiveStep,
    files: list[FileEntry],
    verdict: Verdict,
    on_bytes: OnBytes,
) -> None:
    def read(entry: FileEntry) -> OrchestratorError | None:
        try:
            check(live, entry)
        except OrchestratorError as error:
            return error
        on_bytes(entry.bytes)
        return None

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        for error in pool.map(read, files):
            if error:
                verdict.note(error)
    verdict.files = len(files)


def _read_records(stored: StoredStep, manifest: Manifest, verdict: Verdict, *, decode: bool) -> dict[str, int]:
    """Read what every record holds: a checksum that is right says nothing about what is in it. And the tree must have
    the arrays that the manifest has chunks of, so that a restore reads what is checked here. `decode`: so are arrays
    whose chunks only their own metadata describes (compressed, external). Returns the size of each chunk that the tree
    describes."""
    catalog, live = stored.catalog, stored.live
    names = [entry.path for entry in manifest.files]
    try:
        catalog.extra(live, manifest)
        for name in names:
            if name.startswith((layout.RECEIPTS, layout.PROCESS)):
                process = layout.process_of(name)
            if name.startswith(layout.RECEIPTS):
                catalog.receipt(live.id, process)
        leaves = catalog.intent(live, manifest).tree.leaves
        for leaf in leaves if decode else ():
            if leaf.in_store and leaf.chunk is None:  # whole, as a chunk of it may be all of it
                stored.load([ReadRequest(leaf)])
    except OrchestratorError as error:
        verdict.note(error)
        return {}
    sizes = chunk_index.sizes(leaves)
    missing = sorted(sizes.keys() - manifest.chunks.keys()) if manifest.chunks else []
    if missing:
        key = live.id.manifest_key
        verdict.damaged.append(f"{catalog.url}/{key}: lacks {len(missing)} chunks of the tree's arrays: {missing[:3]}")
    return sizes


def _read_chunks(stored: StoredStep, sizes: dict[str, int | None], verdict: Verdict, on_bytes: OnBytes) -> None:
    catalog, live = stored.catalog, stored.live
    try:
        manifest = stored.listed
        bad = stored.bad_chunks(sizes, on_bytes)
    except OrchestratorError as error:
        verdict.note(error)
        return
    verdict.chunks = len(sizes)
    where = _places(catalog, live, manifest, set(bad)) if bad else {}
    verdict.damaged += [f"{where.get(key, key)}: {problem}" for key, problem in bad.items()]


def _places(catalog: Catalog, live: LiveStep, manifest: Manifest, keys: set[str]) -> dict[str, str]:
    """For people: which region of which array a chunk is, and who wrote it, as far as the records can still be read."""
    writers: dict[str, str] = {}
    regions: dict[str, str] = {}
    try:
        for process in range(manifest.process_count):
            found = catalog.receipt(live.id, process)
            for key in keys & ({*found[0].places, *found[0].small} if found else set()):
                writers[key] = f" of process {process} ({manifest.hosts[process]})"
        for leaf in catalog.intent(live, manifest).tree.leaves:
            regions |= _regions(leaf, keys)
    except OrchestratorError:
        pass  # the damage that keeps us from reading them is on the list already
    return {key: regions.get(key, key) + writers.get(key, "") for key in keys}


def _regions(leaf: LeafSpec, keys: set[str]) -> dict[str, str]:
    if not leaf.in_store or leaf.chunk is None:
        return {}
    whole = Box(start=(0,) * len(leaf.file_shape), stop=leaf.file_shape)
    boxes = ((zarr_chunks.key(leaf.name, box, leaf.chunk), box) for box in zarr_chunks.cut(whole, leaf.chunk))
    return {key: leaf.label + fingerprints.shown(box) for key, box in boxes if key in keys}

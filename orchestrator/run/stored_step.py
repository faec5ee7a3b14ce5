"""One committed step as it is stored, read so that what cannot be read is never called damaged.

What the data plane finds wrong is a suspicion (`Suspect`). Here it becomes a verdict, by asking the store again in
another way: `Damaged` if the store's own account of a file, or a chunk of a file read whole, is not what the manifest
promises; `StepRetired` if retention has come between; else the step is read again, and in the end it is `Unavailable`:
the step may be whole, and nothing may be quarantined for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NoReturn, TypeVar

import crc32c

from orchestrator import arrays
from orchestrator.arrays import ReadRequest, fingerprint
from orchestrator.errors import Damaged, StorageError, Suspect, Unavailable
from orchestrator.observe.events import Retried, emit
from orchestrator.rules import chunk_index
from orchestrator.rules import keys as layout
from orchestrator.rules.chunk_index import Chunk
from orchestrator.rules.records import Box, Extra, Intent, LeafSpec, LiveStep, Manifest
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES
from orchestrator.run.journal_store import READS, Catalog
from orchestrator.storage import local_path, overlap
from orchestrator.storage.overlap import Begun

_PAUSE_S = 0.5  # before what could not be read is read again
_SLAB_BYTES = 64 << 20  # of an array that is read to be compared

OnBytes = Callable[[int], None]
Value = TypeVar("Value")


class StoredStep:
    """One attempt that the journal lists. On one thread at a time. Whatever is read raises Damaged (proven),
    StepRetired, Unavailable or another StorageError."""

    def __init__(self, catalog: Catalog, live: LiveStep) -> None:
        self.catalog, self.live = catalog, live
        self.prefix = live.id.prefix
        self._early: dict[str, Begun[bytes | None]] = {}
        self._listing: Begun[dict[str, int]] | None = None

    def begin(self) -> None:
        """Read at once what a restore reads beside arrays: its records do not lead to one another. Each is judged, and
        read again if need be, when it is asked for, as without this."""
        self._early = {name: self.catalog.begin(self.live, name) for name in (layout.INTENT, layout.EXTRA)}
        self._listing = overlap.begin(partial(self.catalog.sizes, self.live))

    @property
    def where(self) -> str:
        return f"{self.catalog.url} {self.live.id.label}"

    @property
    def state_url(self) -> str:
        return f"{self.catalog.url}/{self.prefix}{layout.STATE}"

    @cached_property
    def listed(self) -> Manifest:
        """The manifest as the journal has its checksum: once it was read it cannot become another."""
        return self.catalog.manifest(self.live)

    @cached_property
    def manifest(self) -> Manifest:
        """Every file of it is there, in its size."""
        listed = self.listed
        listing, self._listing = self._listing, None
        self.catalog.check_sizes(self.live, listed, listing)
        return self.listed

    @cached_property
    def intent(self) -> Intent:
        return self.catalog.intent(self.live, self.manifest, self._early.pop(layout.INTENT, None))

    @cached_property
    def extra(self) -> Extra:
        return self.catalog.extra(self.live, self.manifest, self._early.pop(layout.EXTRA, None))

    # Arrays.

    def load(
        self,
        loads: Sequence[ReadRequest],
        on_bytes: OnBytes | None = None,
        reader: Callable[..., list[Any]] = arrays.load,
    ) -> list[Any]:
        """As `arrays.load`, of this step."""
        return self._again(lambda: reader(self.state_url, list(loads), on_bytes, chunk_index.stored(self.manifest)))

    def slabs(
        self, leaves: Iterable[LeafSpec], slab_bytes: int, on_bytes: OnBytes | None = None
    ) -> Iterator[tuple[LeafSpec, Box, Any]]:
        """As `arrays.slabs`, of this step. What is read wrongly is judged, but not read again."""
        try:
            yield from arrays.slabs(self.state_url, leaves, slab_bytes, on_bytes, chunk_index.stored(self.manifest))
        except Suspect as suspect:
            self._judge(suspect)
            raise self._not_damaged(suspect, 1) from suspect

    def bad_chunks(
        self, sizes: Mapping[str, int | None], on_bytes: OnBytes = lambda read_bytes: None
    ) -> Mapping[str, str]:
        """Read these chunks, of these sizes where they are known. By key: what is wrong with each that is proven not to
        be what was saved."""
        stored = chunk_index.stored(self.manifest)
        suspects = self._again(lambda: arrays.check(self.state_url, stored, on_bytes, sizes))
        if not suspects:
            return {}
        proven = {key: f"{text}; {why}" for key, text in suspects.items() if (why := self._problem_of(key, sizes[key]))}
        for key, text in suspects.items():
            if key not in proven and arrays.check(self.state_url, stored, sizes={key: sizes[key]}):
                raise self._not_damaged(Suspect(text), 2)
        return proven

    def wrong_fingerprints(self, names: Iterable[str]) -> list[str]:
        """Of these leaves, those whose stored elements do not have the fingerprint of the save, one line each."""
        known = self.manifest.fingerprints
        found = []
        for leaf in self.intent.tree.leaves:
            if leaf.name in set(names) & known.keys():
                pieces = ((box, data) for _, box, data in self.slabs([leaf], _SLAB_BYTES))
                got = fingerprint.of_pieces(leaf, pieces)
                if got != known[leaf.name]:
                    found.append(
                        f"{leaf.label}: its stored elements have fingerprint {got}, the save {known[leaf.name]}"
                    )
        return found

    def judge_fingerprints(self, names: Sequence[str], text: str) -> NoReturn:
        """These leaves have come up with other fingerprints (`text`), though every checksum was right: either something
        else was saved, or it was changed on its way to the devices. Raises Damaged or Unavailable."""
        wrong = self.wrong_fingerprints(names)
        if wrong:
            raise Damaged(f"{self.where}: {text}; {wrong[0]}")
        raise Unavailable(
            f"{self.where}: {text}; but what is stored has the fingerprints of the save: a device, the memory or the "
            "restore of this job changes data; the step is not damaged",
            waited=True,
        )

    def _again(self, read: Callable[[], Value]) -> Value:
        """What `read` returns. What it suspects is judged, and what it could not read is tried again, READS times."""
        for tries in range(1, READS + 1):
            pause_s = _PAUSE_S
            try:
                return read()
            except Suspect as suspect:
                self._judge(suspect)
                # On a file system it was read from the very files that were measured; of an object store, who knows.
                if suspect.structure and tries == READS and local_path(self.state_url) is not None:
                    self.catalog.check_live(self.live)
                    raise Damaged(
                        f"{suspect}; read so {READS} times, and its files are the manifest's: no save writes this"
                    ) from suspect
                failed: Exception = suspect
                pause_s = 0.0  # the store has just answered
            except StorageError as error:
                if tries == READS or (isinstance(error, Unavailable) and error.waited):
                    self.catalog.check_live(self.live)
                    raise
                failed = error
            emit(Retried("read", tries, "restore", self.where, str(failed)[:300], pause_s))
            time.sleep(pause_s)
        raise self._not_damaged(failed, READS) from failed

    def _not_damaged(self, error: Exception, times: int) -> Unavailable:
        count = "once" if times == 1 else f"{times} times"
        return Unavailable(
            f"{error}; read so {count}, but by the store's own account all is as the manifest says: the step is not "
            "damaged; look at the network, the caches and the memory of this host"
        )

    # Judging.

    def _judge(self, suspect: Suspect) -> None:
        try:
            self.judge(suspect.files, suspect.chunks)
        except Damaged as proof:
            raise Damaged(f"{suspect}; {proof}", files=proof.files, chunks=proof.chunks) from suspect

    def judge(self, files: Sequence[str], keys: Sequence[str]) -> None:
        """Whether these files (of none: all) and these chunks are what was saved, by another way than they were read.
        Raises Damaged, StepRetired, StorageError; nothing if the store has what the manifest promises."""
        self.catalog.check_live(self.live)
        manifest = self.catalog.manifest(self.live)
        listed = {entry.path: entry for entry in manifest.files}
        unlisted = set(files) - listed.keys() - {layout.MANIFEST}
        if unlisted:
            raise Damaged(f"{self.where}: {min(unlisted)} is no file of its manifest", files=sorted(unlisted))
        suspects = [listed[path] for path in files or listed if path in listed]
        self.catalog.check_measured(self.live, suspects)
        for entry in suspects:
            if entry.crc32 and entry.path.startswith(layout.STATE):  # a store knows one CRC, which is that of all trees
                self.catalog.checked(self.live, entry)
        for key in keys:
            if problem := self._problem_of(key):
                raise Damaged(problem, chunks=[key])

    def _problem_of(self, key: str, size_bytes: int | None = None) -> str:
        """What is proven to be wrong with a chunk (of `size_bytes`, if they are known), '' if it is what was saved: its
        file is read whole."""
        manifest = self.listed
        if key not in manifest.chunks:
            return ""
        try:
            chunk = self._chunks.get(key, b"")
            if not isinstance(chunk, bytes):
                path, offset, size = chunk
                entry = next(entry for entry in manifest.files if entry.path == layout.STATE + path)
                chunk = self.catalog.checked(self.live, entry)[offset : offset + size]
        except Damaged as error:
            return str(error)
        if size_bytes is not None and len(chunk) != size_bytes:
            return f"{self.where}: chunk {key} has {len(chunk)} bytes, the tree spec {size_bytes}"
        got = f"{crc32c.crc32c(chunk[:-CHECKSUM_BYTES]):08x}"
        if got == manifest.chunks[key]:
            return ""
        what = "damaged, or another save's"
        return f"{self.where}: chunk {key}: crc32c {got}, the manifest says {manifest.chunks[key]}; it is {what}"

    @cached_property
    def _chunks(self) -> Mapping[str, Chunk]:
        """Key -> chunk or place, as the processes signed them."""
        return chunk_index.entries(self.catalog.stored_receipts(self.live, self.listed))

"""One committed step as it is stored: its records and files, each checked against what is above it.

The journal has the manifest's checksum, the manifest those of all files, and the manifest's chunks those of all
elements. What does not fit is `Damaged` if the store's own account of it, or a second reading, is wrong as well;
`StepRetired` if retention has come between; else `Unavailable`: the step may be whole, and nothing may be quarantined
for it (`checked_reads`). `stored_arrays` reads the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial

import crc32c

from orchestrator.errors import Damaged, Suspect, Unavailable
from orchestrator.rules import chunk_index, keys, validate
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.chunk_index import Chunks
from orchestrator.rules.codec import RECORD_BYTES_MAX, AnyRecord
from orchestrator.rules.records import Extra, FileEntry, Intent, LiveStep, Manifest, Receipt
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES
from orchestrator.run.checked_reads import (
    READS,
    Early,
    attempt_file,
    decoded,
    file_problem,
    manifest_problem,
    receipts_in,
)
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Reads
from orchestrator.storage.sources import Sources

_READ_THREADS = 4  # each holds one file in memory
_MEASURE_THREADS = 8


class StoredStep:
    """One attempt that the journal lists; `JournalStore.step` opens it, which reads nothing yet. On one thread at a
    time, but for `checked` and `check_measured`. `check_live` raises StepRetired once the journal lists it no more.

    `manifest`, `intent` and `extra` are read when they are first asked for, and kept. Whatever is read raises Damaged
    (proven), StepRetired, Unavailable or another StorageError.
    """

    def __init__(self, storage: Reads, live: LiveStep, check_live: Callable[[LiveStep], None]) -> None:
        self.storage, self.live = storage, live
        self._check_live = check_live
        self._early: dict[str, Begun[bytes | None]] = {}
        self._listing: Begun[dict[str, int]] | None = None

    def read_ahead(self) -> None:
        """Begin to read what a restore reads beside arrays: its records do not lead to one another. Each is checked,
        and read again if need be, when it is asked for, as without this."""
        for key in (self.id.key(keys.INTENT), self.id.key(keys.EXTRA)):
            self._early[key] = overlap.begin(partial(self.storage.get, key))
        self._listing = overlap.begin(self._sizes)

    @property
    def id(self) -> AttemptId:
        return self.live.id

    @property
    def where(self) -> str:
        return f"{self.storage.url} {self.id.label}"

    @property
    def state_url(self) -> str:
        return f"{self.storage.url}/{self.id.state_prefix}"

    def url_of(self, name: str) -> str:
        """How the file `name` is called in messages."""
        return f"{self.storage.url}/{self.id.prefix}{name}"

    # Records.

    @cached_property
    def manifest(self) -> Manifest:
        """As the journal has its checksum. Whether its files are there, `check_sizes` tells."""
        return self._read_manifest()

    def _read_manifest(self) -> Manifest:
        problem = partial(manifest_problem, self.live.manifest_crc32c)
        body = attempt_file(self.storage, self.id, keys.MANIFEST, problem, self.check_live)
        return self._decoded(keys.MANIFEST, body, Manifest, step=self.id.step, attempt=self.id.name)

    @cached_property
    def intent(self) -> Intent:
        """Who opened the attempt, and its tree spec, whose arrays fit what the manifest lists."""
        intent = self._decoded(keys.INTENT, self.file(keys.INTENT), Intent, step=self.id.step, attempt=self.id.name)
        try:
            validate.fits(intent, self.manifest)
        except validate.Invalid as error:
            raise Damaged(f"{self.url_of(keys.INTENT)}: {error}; not used") from error
        return intent

    @cached_property
    def extra(self) -> Extra:
        return self._decoded(keys.EXTRA, self.file(keys.EXTRA), Extra, step=self.id.step)

    def receipts(self) -> list[Receipt]:
        """One of each process, as far as the manifest lists any: an adopted step has none."""
        found: dict[int, Receipt] = {}
        for entry in self._below(keys.RECEIPTS):
            for receipt in receipts_in(self.storage.url, self.id, entry.path, self.checked(entry)):
                found.setdefault(receipt.process, receipt)  # the same, where its group and it itself have stored it
        return [found[process] for process in sorted(found)]

    def process_states(self) -> dict[int, bytes]:
        """What each process of the save gave, by its index then."""
        files = self._below(keys.PROCESS)
        if not files:
            return {}
        with ThreadPoolExecutor(min(_READ_THREADS, len(files)), thread_name_prefix="process-states") as pool:
            bodies = pool.map(self.checked, files)
            return {keys.process_of(entry.path): body for entry, body in zip(files, bodies, strict=True)}

    def _decoded(self, name: str, body: bytes | None, kind: type[AnyRecord], **expected: object) -> AnyRecord:
        return decoded(self.storage.url, self.id.key(name), body, kind, **expected)

    # Files.

    def file(self, name: str) -> bytes | None:
        """A small file, as the manifest says it is; None if the manifest lists none of that name."""
        entry = next((entry for entry in self.manifest.files if entry.path == name), None)
        return None if entry is None else self.checked(entry)

    def checked(self, entry: FileEntry) -> bytes:
        """A file, read whole, as the manifest's `entry` says it is. Any thread."""
        most_bytes = max(entry.bytes, RECORD_BYTES_MAX)  # a process's state may be of any size
        early: Early = self._early.pop(self.id.key(entry.path), None)
        problem = partial(file_problem, entry)
        return attempt_file(self.storage, self.id, entry.path, problem, self.check_live, most_bytes, early)

    def check_files(self, below: str, share: tuple[int, int]) -> None:
        """Read this process's share, (index, count), of the files below a name whole, a few at a time. Raises Damaged
        naming the first that is not what the manifest says."""
        index, count = share
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="verify") as pool:
            for _ in pool.map(lambda entry: len(self.checked(entry)), self._below(below)[index::count]):
                pass

    def read_in_store(self) -> None:
        """Read its files where `state_url` is, and nowhere else: what is read there by other means is to be checked."""
        if isinstance(self.storage, Sources):
            self.storage.last_only()

    def check_sizes(self) -> None:
        """Every file of the manifest is there with its size. Raises Damaged naming the first that is not, Unavailable
        where a listing and the object itself tell different things."""
        files = self.manifest.files  # before the listing is waited for: both are read at the same time
        early, self._listing = self._listing, None
        for _ in range(READS):
            there, early = early.result() if early else self._sizes(), None
            wrong = [expected for expected in files if there.get(expected.path) != expected.bytes]
            if not wrong:
                return
            self.check_measured(wrong[:1])
            self.check_live()
        raise Unavailable(
            f"{self.url_of(wrong[0].path)}: {READS} listings show {there.get(wrong[0].path, 'no')} bytes, "
            f"the store's own account is {wrong[0].bytes}, as the manifest says"
        )

    def check_measured(self, entries: Iterable[FileEntry]) -> None:
        """These files are in the store, by its own account, as the manifest says: an object store knows its objects'
        checksums without a download. Raises Damaged naming the first that is not. The caller makes sure that the
        attempt is live, before or after. Any thread."""

        def problem(entry: FileEntry) -> str:
            return file_problem(entry, self.storage.measure(self.id.key(entry.path), entry.bytes))

        expected = list(entries)
        with ThreadPoolExecutor(_MEASURE_THREADS, thread_name_prefix="measure") as pool:
            for entry, wrong in zip(expected, pool.map(problem, expected), strict=True):
                if wrong:
                    self.check_live()
                    raise Damaged(f"{self.url_of(entry.path)}: {wrong}", files=[entry.path])

    def check_live(self) -> None:
        """Raises StepRetired if the journal lists the attempt no more: what is wrong with it is no damage then."""
        self._check_live(self.live)

    def _below(self, name: str) -> list[FileEntry]:
        return [entry for entry in self.manifest.files if entry.path.startswith(name)]

    def _sizes(self) -> dict[str, int]:
        """Bytes of each file by its name, as a listing has them."""
        prefix = self.id.prefix
        return {entry.key.removeprefix(prefix): entry.bytes for entry in self.storage.list(prefix)}

    # Judging what was read in another way, by the data plane.

    def judge_suspect(self, suspect: Suspect) -> None:
        """As `judge`, of what the data plane suspects. Raises Damaged with both accounts."""
        try:
            self.judge(suspect.files, suspect.chunks)
        except Damaged as proof:
            raise Damaged(f"{suspect}; {proof}", files=proof.files, chunks=proof.chunks) from suspect

    def judge(self, files: Sequence[str], chunk_keys: Sequence[str]) -> None:
        """Whether these files (of none: all) and these chunks are what was saved, by another way than they were read.
        Raises Damaged, StepRetired, StorageError; nothing if the store has what the manifest promises."""
        self.check_live()
        manifest = self._read_manifest()  # once more: whether it can still be read is part of the answer
        listed = {entry.path: entry for entry in manifest.files}
        unlisted = set(files) - listed.keys() - {keys.MANIFEST}
        if unlisted:
            raise Damaged(f"{self.where}: {min(unlisted)} is no file of its manifest", files=sorted(unlisted))
        suspects = [listed[path] for path in files or listed if path in listed]
        self.check_measured(suspects)
        for entry in suspects:
            if entry.crc32 and entry.path.startswith(keys.STATE):  # a store knows one CRC, which is that of all trees
                self.checked(entry)
        for key in chunk_keys:
            if problem := self.chunk_problem(key):
                raise Damaged(problem, chunks=[key])

    def chunk_problem(self, key: str, size_bytes: int | None = None) -> str:
        """What is proven to be wrong with a chunk (of `size_bytes`, if they are known), '' if it is what was saved: its
        file is read whole."""
        manifest = self.manifest
        if key not in manifest.chunks:
            return ""
        try:
            chunk = self._chunks.get(key, b"")
            if not isinstance(chunk, bytes):
                path, offset, size = chunk
                entry = next(entry for entry in manifest.files if entry.path == keys.STATE + path)
                chunk = self.checked(entry)[offset : offset + size]
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
    def _chunks(self) -> Chunks:
        """Key -> chunk or place, as the processes signed them."""
        return chunk_index.entries(self.receipts())

"""What the tiers of a host hold, and held steps to read: each of their files from wherever it is.

A part of a step is what one process has written of it, in a directory of that process's number. Its copy on another
host is the same files in a directory of the same name. So whoever looks need not know which of the two it has found:
it tells which files of the manifest each directory has, by their sizes, and reading proves the rest.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import Damaged, OrchestratorError, StorageError, Unavailable
from orchestrator.observe.events import CopyDropped, emit
from orchestrator.rules import held, held_files, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held import Offer
from orchestrator.rules.records import LiveStep, Manifest, file_entry
from orchestrator.rules.restore_sources import MEMORY
from orchestrator.run import tier_directory
from orchestrator.run.checked_reads import decoded
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.run.tier import log_to_read, newest_whole
from orchestrator.storage import PosixStorage
from orchestrator.storage.port import Reads
from orchestrator.storage.sources import Source, Sources

Placed = Sequence[tuple[Source, frozenset[int]]]  # where files of a step are, by their numbers (`held_files.names`)


Check = Callable[[LiveStep], None]


def _alive(live: LiveStep) -> None:
    """No log takes a held step away while it is read: what is freed is missing."""


@dataclass(frozen=True)
class Wrong:
    """A file of a step in one place that is not what was written."""

    source: Source
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source.url}: {self.file}: {self.reason}"


class HeldSteps:
    """What the tiers of one host have. parts: by the process whose directory it is. url: what messages call them all.
    Main thread.

    listed: what their logs say is held, whole or not. faults: of what cannot be had, why. unreadable: of tiers, why.
    """

    def __init__(self, url: str, parts: Mapping[int, Source], unreadable: Iterable[str] = ()) -> None:
        self.url, self.parts, self.unreadable = url, parts, list(unreadable)
        self.faults: dict[AttemptId, str] = {}
        self._manifests: dict[Offer, Manifest] = {}
        self._told: set[tuple[AttemptId, str, str]] = set()
        self.listed = self._read_logs()

    def _read_logs(self) -> dict[Offer, LiveStep]:
        found: dict[Offer, LiveStep] = {}
        for source in self.parts.values():
            try:
                head = newest_whole(log_to_read(source.reads))
            except OrchestratorError as error:
                self.unreadable.append(str(error))
                continue
            for live in head.live if head else ():
                found.setdefault(held.offer(live), live)
        return found

    # What is here.

    def has(self, live: LiveStep) -> bool:
        """Whether anything of a step is here."""
        try:
            return any(True for source in self.parts.values() for _ in source.reads.list(live.id.prefix))
        except StorageError as error:
            self.faults[live.id] = str(error)
            return False

    def unlogged(self, besides: Iterable[AttemptId] = ()) -> dict[Offer, LiveStep]:
        """Of attempts that no log here lists, those whose manifest is here: the logs that did may be lost with their
        hosts, and whoever writes a manifest has all receipts."""
        known = {offer.id for offer in self.listed}.union(besides)
        found: dict[Offer, LiveStep] = {}
        for source in self.parts.values():
            for entry in source.reads.list(keys.STEPS):
                attempt, name = AttemptId.in_key(entry.key) or (None, "")
                if attempt and name == keys.MANIFEST and attempt not in known:
                    with contextlib.suppress(OrchestratorError):
                        live = _live(source.reads, attempt)
                        found.setdefault(held.offer(live), live)
        return found

    def manifest(self, live: LiveStep, elsewhere: Sequence[Source] = ()) -> Manifest:
        """Of a step, from this host, or from `elsewhere`. Kept. Raises Damaged, StorageError."""
        if (offer := held.offer(live)) not in self._manifests:
            sources = (*self._with_manifest(live), *elsewhere)
            if not sources:
                raise StorageError(f"{self.url}: {live.id.manifest_key} is missing")
            self._manifests[offer] = self._opened(live, lambda key: sources).manifest
        return self._manifests[offer]

    def where_manifest(self, live: LiveStep) -> int | None:
        """In whose directory here its manifest is, and whole; None if it is in none."""
        for process, source in self.parts.items():
            if self._has_manifest(live, source):
                try:
                    self._manifests[held.offer(live)] = self._opened(live, lambda key, one=source: [one]).manifest  # type: ignore[misc]
                except OrchestratorError as error:
                    self.faults[live.id] = str(error)
                else:
                    return process
        return None

    def _with_manifest(self, live: LiveStep) -> list[Source]:
        return [source for source in self.parts.values() if self._has_manifest(live, source)]

    def _has_manifest(self, live: LiveStep, source: Source) -> bool:
        key = live.id.manifest_key
        try:
            return any(entry.key == key for entry in source.reads.list(key))
        except StorageError as error:
            self.faults[live.id] = str(error)
            return False

    def files(self, live: LiveStep, manifest: Manifest) -> tuple[dict[int, frozenset[int]], list[Wrong]]:
        """By process: which files of a step are in its directory, as far as their sizes tell; and what is there but not
        as it was written. Raises StorageError."""
        sizes = {entry.path: (number, entry.bytes) for number, entry in enumerate(manifest.files, 1)}
        found, wrong = {}, list[Wrong]()
        for process, source in self.parts.items():
            numbers = set()
            for entry in source.reads.list(live.id.prefix):
                name = entry.key.removeprefix(live.id.prefix)
                number, size = sizes.get(name, (0 if name == keys.MANIFEST else -1, entry.bytes))
                if entry.problem or size != entry.bytes:
                    what = entry.problem or f"has {entry.bytes} bytes, the manifest says {size}"
                    wrong.append(Wrong(source, name, what))
                elif number >= 0:
                    numbers.add(number)
            if numbers:
                found[process] = frozenset(numbers)
        return found, wrong

    def offers(self) -> list[Offer]:
        """The held steps of which this host has every file."""
        found = []
        for offer, live in self.listed.items():
            try:
                manifest = self.manifest(live)
                files, wrong = self.files(live, manifest)
            except OrchestratorError as error:
                self.faults[offer.id] = str(error)
                continue
            if lacking := held_files.lacking(manifest, files.values()):
                self.faults[offer.id] = str(wrong[0]) if wrong else f"{lacking} is missing"
            else:
                found.append(offer)
        return found

    # Reading.

    def step(self, offer: Offer) -> StoredStep:
        """One of `offers`."""
        live = self.listed[offer]
        files, _ = self.files(live, self.manifest(live))
        return self.placed(live, [(self.parts[process], numbers) for process, numbers in files.items()])

    def placed(self, live: LiveStep, placed: Placed, store: Source | None = None, check: Check = _alive) -> StoredStep:
        """A step whose files lie at these places, in the order in which to ask; those that are committed, in the
        `store`, too. What is wrong somewhere is told (`CopyDropped`), once."""
        at = _Index(live, placed, store)
        is_remote = any(source.is_remote for source, _ in placed) or bool(store and store.is_remote)
        step = self._opened(live, at.sources, at.listing, is_remote, check, store.url if store else self.url)
        at.manifest = lambda: step.manifest
        if held.offer(live) in self._manifests:
            step.manifest = self._manifests[held.offer(live)]
        return step

    def _opened(
        self,
        live: LiveStep,
        of: Callable[[str], Sequence[Source]],
        files: Callable[[], Mapping[str, int]] = dict,
        is_remote: bool = False,
        check: Check = _alive,
        url: str = "",
    ) -> StoredStep:
        def tell(source: Source, key: str, reason: str) -> None:
            self.tell(live.id, Wrong(source, key.removeprefix(live.id.prefix), reason))

        return StoredStep(Sources(url or self.url, of, files, tell, is_remote), live, check)

    def tell(self, attempt: AttemptId, wrong: Wrong) -> None:
        """What was wrong in one place, once. Any thread."""
        if (where := (attempt, wrong.source.url, wrong.file)) not in self._told:
            self._told.add(where)
            emit(CopyDropped(attempt.step, attempt.name, wrong.source.url, wrong.file, wrong.reason))


def on_this_host(own: str, paths: Iterable[str]) -> HeldSteps:
    """What is in the directories of processes at `paths`, as far as they are ours alone; the own one, `own`, first."""
    parts, unreadable = {}, []
    for path in sorted(set(paths), key=lambda path: (path != own, path)):
        try:
            tier_directory.check_path(path)
        except StorageError as error:
            unreadable.append(str(error))
        else:
            parts[tier_directory.process_of(path)] = Source(MEMORY, PosixStorage(path))
    return HeldSteps(os.path.dirname(own), parts, unreadable)


class _Index:
    """Where each file of a step is, by its key. manifest: how the step's names are learned, once one is asked for."""

    def __init__(self, live: LiveStep, placed: Placed, store: Source | None) -> None:
        self._live, self._placed, self._store = live, placed, store
        self.manifest: Callable[[], Manifest]
        self._manifests = [source for source, numbers in placed if 0 in numbers] + ([store] if store else [])
        self._lock = threading.Lock()
        self._at: dict[str, list[Source]] = {}
        self._sizes: dict[str, int] = {}

    def sources(self, key: str) -> Sequence[Source]:
        if key == self._live.id.manifest_key:
            return self._manifests
        found = self._known().get(key) or ([self._store] if self._store else [])
        if not found:
            raise Unavailable(f"{key}: no tier has it")
        return found

    def listing(self) -> Mapping[str, int]:
        """What is in tiers was looked at when it was offered; only for the rest the store is asked."""
        at = self._known()
        found = {key: size for key, size in self._sizes.items() if key in at}
        if self._store and len(found) < len(self._sizes):
            stored = self._store.reads.list(self._live.id.prefix)
            found |= {entry.key: entry.bytes for entry in stored if entry.key not in found}
        return found

    def _known(self) -> Mapping[str, list[Source]]:
        with self._lock:
            if not self._sizes:
                manifest = self.manifest()
                names = held_files.names(manifest)
                sizes = {self._live.id.key(entry.path): entry.bytes for entry in manifest.files}
                at: dict[str, list[Source]] = {}
                for source, numbers in self._placed:
                    for number in numbers:
                        at.setdefault(self._live.id.key(names[number]), []).append(source)
                if self._store:
                    for sources in at.values():
                        sources.append(self._store)
                self._at, self._sizes = at, sizes
        return self._at


def not_of_this_journal(store: JournalStore, manifest: Manifest) -> str:
    """Why a held step is none of the run whose journal `store` has; '' if it is one. A journal that was copied, or set
    back to a backup, counts on with the same versions and epochs, and steps: the entry that the step builds on tells
    them apart. Raises StorageError."""
    version = manifest.built_on
    try:
        known = store.entry(version).write_id if version >= 0 else ""
    except Damaged as error:
        return f"builds on version {version} of the run's journal: {error}"
    if known and known == manifest.built_on_id:
        return ""
    text = "a copy of the run holds it, or the run was set back to a backup since"
    return f"builds on another version {version} of the journal than the run has: {text}; not taken"


def _live(reads: Reads, attempt: AttemptId) -> LiveStep:
    """An attempt as a log would list it, by its manifest. Raises Damaged, StorageError."""
    body = reads.get(attempt.manifest_key)
    manifest = decoded(reads.url, attempt.manifest_key, body, Manifest, step=attempt.step, attempt=attempt.name)
    crc = file_entry(keys.MANIFEST, body or b"").crc32c
    return known(attempt, crc, manifest.total_bytes)


def known(attempt: AttemptId, manifest_crc32c: str, total_bytes: int, time: float = 0.0) -> LiveStep:
    """An attempt of which no more is known."""
    return LiveStep(attempt.step, attempt.name, manifest_crc32c, "", total_bytes, {}, time)

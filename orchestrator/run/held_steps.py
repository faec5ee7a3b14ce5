"""What the tiers of this host hold, and held steps to read: each of their files from wherever it is.

A part of a step is what one process has written of it, in a directory of that process's number. Its copy on another
host is the same files in a directory of the same name. So whoever looks need not know which of the two it has found:
it tells which files of the manifest each directory has, by their sizes, and reading proves the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.observe.events import CopyDropped, emit
from orchestrator.rules import held, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held import Offer
from orchestrator.rules.records import LiveStep, Manifest
from orchestrator.run import tier_directory
from orchestrator.run.stored_step import StoredStep
from orchestrator.run.tier import log_to_read, newest_whole
from orchestrator.storage import PosixStorage
from orchestrator.storage.sources import Source, Sources

MEMORY, PEERS, STORE = "memory", "peers", "store"  # where bytes come from, in the order in which they are asked

Placed = Sequence[tuple[Source, frozenset[int]]]  # where files of a step are, by their numbers (`held.names`)


class HeldSteps:
    """What the directories at `paths` have, as this process reads it; its own one, `own`, first. Main thread.

    listed: what their logs say is held, whole or not. faults: of what cannot be had, why. unreadable: of tiers, why.
    """

    def __init__(self, own: str, paths: Iterable[str]) -> None:
        self.url = os.path.dirname(own)
        self.faults: dict[AttemptId, str] = {}
        self.unreadable: list[str] = []
        self.parts: dict[int, Source] = {}  # by the process whose directory it is
        self._told: set[tuple[AttemptId, str, str]] = set()
        logs = []
        for path in sorted(set(paths), key=lambda path: (path != own, path)):
            if not os.path.lexists(path):  # another machine's
                continue
            try:
                tier_directory.check_path(path)
            except StorageError as error:
                self.unreadable.append(str(error))
                continue
            storage = PosixStorage(path)
            self.parts[tier_directory.process_of(path)] = Source(MEMORY, storage)
            logs.append(storage)
        self.listed = self._read_logs(logs)

    def _read_logs(self, tiers: Sequence[PosixStorage]) -> dict[Offer, LiveStep]:
        found: dict[Offer, LiveStep] = {}
        for tier in tiers:
            try:
                head = newest_whole(log_to_read(tier))
            except OrchestratorError as error:
                self.unreadable.append(str(error))
                continue
            for live in head.live if head else ():
                found.setdefault(held.offer(live), live)
        return found

    # What is here.

    def manifest(self, live: LiveStep, elsewhere: Sequence[Source] = ()) -> Manifest:
        """Of a held step, from this host, or from `elsewhere`. Raises Damaged, StorageError."""
        sources = (*self.parts.values(), *elsewhere)
        if not sources:
            raise StorageError(f"{self.url}: nothing is held there")
        there = [one for one in sources if one.is_remote or self._has(one, live.id.key(keys.MANIFEST))]
        return self._opened(live, lambda key: there or sources, {}).manifest

    @staticmethod
    def _has(source: Source, key: str) -> bool:
        return any(entry.key == key for entry in source.reads.list(key))

    def files(self, live: LiveStep, manifest: Manifest) -> dict[int, frozenset[int]]:
        """By process: which files of the step are in its directory here, as far as their sizes tell."""
        sizes = {entry.path: (number, entry.bytes) for number, entry in enumerate(manifest.files, 1)}
        found = {}
        for process, source in self.parts.items():
            numbers = set()
            for entry in source.reads.list(live.id.prefix):
                name = entry.key.removeprefix(live.id.prefix)
                number, size = sizes.get(name, (-1, -1))
                if name == keys.MANIFEST:
                    numbers.add(0)
                elif size == entry.bytes and not entry.problem:
                    numbers.add(number)
            if numbers:
                found[process] = frozenset(numbers)
        return found

    def here(self, live: LiveStep, manifest: Manifest) -> Placed:
        return [(self.parts[process], numbers) for process, numbers in self.files(live, manifest).items()]

    def fault(self, live: LiveStep, manifest: Manifest, name: str) -> str:
        """What is here under the name of a file that none has."""
        size = next((entry.bytes for entry in manifest.files if entry.path == name), 0)
        for source in self.parts.values():
            for entry in source.reads.list(live.id.key(name)):
                if entry.key == live.id.key(name):
                    is_what = entry.problem or f"has {entry.bytes} bytes"
                    return f"{source.url}/{entry.key}: {is_what}, the manifest says {size} bytes"
        return f"{name} is missing"

    def offers(self) -> list[Offer]:
        """The held steps of which this host has every file."""
        found = []
        for offer, live in self.listed.items():
            try:
                manifest = self.manifest(live)
                placed = self.here(live, manifest)
            except OrchestratorError as error:
                self.faults[offer.id] = str(error)
                continue
            if lacking := held.lacking(manifest, [numbers for _, numbers in placed]):
                self.faults[offer.id] = self.fault(live, manifest, lacking)
            else:
                found.append(offer)
        return found

    # Reading.

    def step(self, offer: Offer) -> StoredStep:
        """One of `offers`."""
        live = self.listed[offer]
        manifest = self.manifest(live)
        return self.placed(live, manifest, self.here(live, manifest))

    def placed(self, live: LiveStep, manifest: Manifest, placed: Placed) -> StoredStep:
        """A step whose files all lie somewhere, in the order in which to ask. What is wrong there is told
        (`CopyDropped`), once."""
        at: dict[str, list[Source]] = {}
        names = held.names(manifest)
        for source, numbers in placed:
            for number in numbers:
                at.setdefault(live.id.key(names[number]), []).append(source)
        sizes = {live.id.key(entry.path): entry.bytes for entry in manifest.files}
        files = {key: size for key, size in sizes.items() if key in at}
        step = self._opened(live, at.__getitem__, files, any(source.is_remote for source, _ in placed))
        step.manifest = manifest
        return step

    def _opened(
        self,
        live: LiveStep,
        of: Callable[[str], Sequence[Source]],
        files: Mapping[str, int],
        is_remote: bool = False,
    ) -> StoredStep:
        def tell(source: Source, key: str, reason: str) -> None:
            file = key.removeprefix(live.id.prefix)
            if (live.id, source.url, file) not in self._told:
                self._told.add((live.id, source.url, file))
                emit(CopyDropped(live.step, live.attempt, source.url, file, reason))

        return StoredStep(Sources(self.url, of, files, tell, is_remote), live, lambda live: None)

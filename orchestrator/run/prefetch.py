"""Bringing what a job will restore into this host's tier, beside the start of its processes. No JAX.

What is fetched is one step: the newest held one that is whole somewhere, of which this host takes its own part from the
peers; else the newest committed one, of which it takes its share from the store, and the other hosts theirs, so that
every byte leaves the store once: whoever needs another's share reads it from that host. It goes into a directory of its
own beside those of the processes (`prefetched`), which has no log: files appear there whole, under the keys that they
have in the attempt, and are checked like any copy; of a committed step its manifest, too, by which a restore finds it.
A restore that comes before the end takes what is there, and the rest from where it is. Nothing of the processes' own is
freed for it, or touched.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock

from absl import logging

from orchestrator.errors import OrchestratorError, StorageError, Unavailable
from orchestrator.rules import held, keys, prefetch
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import FileEntry, Head, LiveStep, Manifest
from orchestrator.rules.restore_sources import PEERS
from orchestrator.run import held_steps, prefetched, tier_directory
from orchestrator.run.checked_reads import attempt_file, decoded, manifest_problem
from orchestrator.run.held_steps import HeldSteps
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.tier import log_to_read, newest_whole
from orchestrator.run.tier_room import NoRoom, Room
from orchestrator.storage import PosixStorage
from orchestrator.storage.peer import Peer, PeerStorage
from orchestrator.storage.pieces import checked
from orchestrator.storage.port import Reads
from orchestrator.storage.sources import Source

_PIECE_BYTES = 4 << 20
_PEER_THREADS = 16
_FETCH_THREADS = 4
_LOGS_READ = 3  # of peers, on a host without one of its own: each says the same
HELD, COMMITTED = "held", "committed"


@dataclass(frozen=True)
class Here:
    """This host. directory: of the tier, None: the environment's. host, hosts: its place among those that fetch.
    peers: the tier servers of the others. bytes_max: what the run's tiers may take here, beside what a job has recorded
    here."""

    directory: str | None
    host: int
    hosts: int
    peers: Sequence[Peer] = ()
    bytes_max: int | None = None


@dataclass
class Fetched:
    """What became of it. kind: HELD, COMMITTED, or '' where there is nothing to fetch. here_bytes: were here before.
    others_bytes: of the rest, what other hosts have or fetch. problems: what could not be had, and why."""

    step: int | None = None
    attempt: str = ""
    kind: str = ""
    peers_bytes: int = 0
    store_bytes: int = 0
    here_bytes: int = 0
    others_bytes: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Wanted:
    """One step, and where its files are. at: by name, the peers' parts that have it. here: names on this host. record:
    of a committed step, the manifest as it is stored."""

    live: LiveStep
    manifest: Manifest
    kind: str
    at: Mapping[str, Sequence[PeerStorage]]
    here: frozenset[str]
    record: bytes = b""


class Prefetch:
    """One fetching. here: this host, for a run. back: so many of the newest steps are left out, as a restore is told
    to. on_bytes: told of what arrives; on_total: of how much that will be. Any thread calls them."""

    def __init__(
        self,
        store: JournalStore,
        here: Callable[[str], Here],
        *,
        back: int = 0,
        timeout_s: float = 600.0,
        on_total: Callable[[int], None] = lambda total: None,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._store, self._find, self._back = store, here, back
        self._end = time.monotonic() + timeout_s
        self._on_total, self._on_bytes = on_total, on_bytes
        self._lock = Lock()
        self._fetched = Fetched()
        self._run = ""

    def run(self) -> Fetched:
        """Raises what reading the journal raises; whatever else fails is one of the problems."""
        head = self._store.head()
        run = None if head is None else tier_directory.identity(self._store)
        if head is None or run is None:
            return self._fetched
        self._run, self._here = run, self._find(run)
        wanted = self._wanted(head)
        if wanted is not None:
            self._fetched.step, self._fetched.attempt, self._fetched.kind = *wanted.live.id, wanted.kind
            self._fetch(wanted)
        return self._fetched

    # What to fetch.

    def _wanted(self, head: Head) -> _Wanted | None:
        mine = tier_directory.of_process(self._here.directory, self._run, self._here.host)
        steps = held_steps.on_this_host(mine, tier_directory.processes(self._here.directory, self._run))
        there = self._attempts()
        if not self._back:  # in a crash loop memory is left out
            listed = dict(steps.listed) or self._listed_by(there)
            standing = held.standing(head)
            admitted = [live for live in listed.values() if standing.admits(live.id)]
            for live in sorted(admitted, key=lambda live: held.rank(live.id), reverse=True):
                if found := self._whole(live, steps, there):
                    return found
        restorable = [live for live in reversed(head.live) if live.restorable]
        if len(restorable) <= self._back:
            return None
        live = restorable[self._back]
        problem, store = partial(manifest_problem, live.manifest_crc32c), self._store
        body = attempt_file(store.storage, live.id, keys.MANIFEST, problem, partial(store.check_live, live))
        made = decoded(store.url, live.id.manifest_key, body, Manifest, step=live.step, attempt=live.attempt)
        return replace(self._placed(live, made, COMMITTED, steps, there), record=body)

    def _attempts(self) -> dict[PeerStorage, set[AttemptId]]:
        """By part of a peer. Peers that do not answer have nothing."""

        def ask(peer: Peer) -> dict[PeerStorage, set[AttemptId]]:
            try:
                return {peer.part(process): set(attempts) for process, attempts in peer.parts().items()}
            except OrchestratorError as error:
                logging.warning("prefetch: %s: left out: %s", peer.url, error)
                return {}

        found: dict[PeerStorage, set[AttemptId]] = {}
        if self._here.peers:
            with ThreadPoolExecutor(min(_PEER_THREADS, len(self._here.peers)), thread_name_prefix="peers") as pool:
                for parts in pool.map(ask, self._here.peers):
                    found.update(parts)
        return found

    def _listed_by(self, there: Mapping[PeerStorage, set[AttemptId]]) -> dict[held.Offer, LiveStep]:
        """What peers' logs say is held, on a host that has no log."""
        found: dict[held.Offer, LiveStep] = {}
        read = 0
        for part in sorted(there, key=lambda part: (part.process - self._here.host) % max(self._here.hosts, 1)):
            with suppress(OrchestratorError):
                log = newest_whole(log_to_read(part))
                if log is not None:
                    found.update({held.offer(live): live for live in log.live})
                    read += 1
            if read == _LOGS_READ:
                break
        return found

    def _whole(self, live: LiveStep, steps: HeldSteps, there: Mapping[PeerStorage, set[AttemptId]]) -> _Wanted | None:
        """A held step, if all of its files are somewhere."""
        elsewhere = [Source(PEERS, part, part.url) for part, attempts in there.items() if live.id in attempts]
        try:
            manifest = steps.manifest(live, elsewhere)
            problem = held_steps.not_of_this_journal(self._store, manifest)
        except OrchestratorError as error:
            problem = str(error)
        if problem:
            logging.warning("prefetch: %s: cannot be taken: %s", live.id.label, problem)
            return None
        found = self._placed(live, manifest, HELD, steps, there)
        names = {entry.path for entry in manifest.files}
        return found if names <= found.here | found.at.keys() else None

    def _placed(
        self,
        live: LiveStep,
        manifest: Manifest,
        kind: str,
        steps: HeldSteps,
        there: Mapping[PeerStorage, set[AttemptId]],
    ) -> _Wanted:
        sizes = {entry.path: entry.bytes for entry in manifest.files}
        at: dict[str, list[PeerStorage]] = {}
        for part in [part for part, attempts in there.items() if live.id in attempts]:
            with suppress(OrchestratorError):
                for name in _names(part, live.id, sizes):
                    at.setdefault(name, []).append(part)
        here: set[str] = set()
        for source in steps.parts.values():
            with suppress(OrchestratorError):
                here |= _names(source.reads, live.id, sizes)
        return _Wanted(live, manifest, kind, at, frozenset(here))

    # Fetching it.

    def _mine(self, wanted: _Wanted) -> list[FileEntry]:
        """Of a held step, the part that the process of this host has written, if there are as many as there were. Of a
        committed one, this host's share."""
        files = wanted.manifest.files
        if wanted.kind == COMMITTED:
            owners = prefetch.shares(files, self._here.hosts)
            mine = [entry for entry, owner in zip(files, owners, strict=True) if owner == self._here.host]
            return [entry for entry in mine if entry.path not in wanted.at]
        if wanted.manifest.process_count != self._here.hosts:
            return []
        return [
            entry for entry in files if any(part.process == self._here.host for part in wanted.at.get(entry.path, ()))
        ]

    def _fetch(self, wanted: _Wanted) -> None:
        mine = [entry for entry in self._mine(wanted) if entry.path not in wanted.here]
        getting = {entry.path for entry in mine}
        for entry in wanted.manifest.files:
            if entry.path in wanted.here:
                self._fetched.here_bytes += entry.bytes
            elif entry.path not in getting:
                self._fetched.others_bytes += entry.bytes
        self._on_total(sum(entry.bytes for entry in mine))
        path = prefetched.of_run(self._here.directory, self._run)
        try:
            prefetched.forget(path, but=wanted.live.id)
            if not mine and not wanted.record:
                return
            tier_directory.make(path)
            into = PosixStorage(path)
            if wanted.record:
                into.create(wanted.live.id.manifest_key, wanted.record)
            with ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="prefetch") as pool:
                for problem in pool.map(lambda entry: self._fetch_one(wanted, entry, into), mine):
                    self._fetched.problems += [problem] if problem else []
        except OrchestratorError as error:
            self._fetched.problems.append(str(error))

    def _fetch_one(self, wanted: _Wanted, entry: FileEntry, into: PosixStorage) -> str:
        """Why it could not be had; '' if it is here now."""
        sources: list[Reads] = list(wanted.at.get(entry.path, ()))
        if wanted.kind == COMMITTED:
            sources.append(self._store.storage)
        problem = f"{wanted.live.id.label}: {entry.path}: nobody has it"
        for source in sources:
            try:
                self._copy(source, wanted.live.id.key(entry.path), entry, into)
            except OrchestratorError as error:
                problem = str(error)
                if time.monotonic() >= self._end:
                    break
                continue
            with self._lock:
                if isinstance(source, PeerStorage):
                    self._fetched.peers_bytes += entry.bytes
                else:
                    self._fetched.store_bytes += entry.bytes
            return ""
        return problem

    def _copy(self, source: Reads, key: str, entry: FileEntry, into: PosixStorage) -> None:
        """Raises StorageError; then nothing of it is here."""
        try:
            reserved = Room(os.path.dirname(into.root.path), self._here.bytes_max).reserve(entry.bytes)
        except NoRoom as error:
            text = f"no room: needs {entry.bytes} bytes, there are {error.seen}"
            raise StorageError(f"{into.url}/{key}: {text}; left to a restore") from error

        def written(count: int) -> None:
            reserved.written(count)
            self._on_bytes(count)

        where = f"{source.url}/{key}"

        def wrong(found: str) -> StorageError:
            expected = f"the manifest says {entry.bytes} with {entry.crc32c}"
            return StorageError(f"{where}: {found}; {expected}; not used")

        def in_time(count: int) -> None:
            if time.monotonic() >= self._end:
                raise Unavailable(f"{where}: the time is up: left to a restore")

        try:
            into.copy(where, key, written, checked(entry, _pieces(source, key, entry.bytes), wrong, in_time))
        finally:
            reserved.end()


def _names(reads: Reads, attempt: AttemptId, sizes: Mapping[str, int]) -> set[str]:
    """Of the files of an attempt, those that are there with their size."""
    prefix = attempt.prefix
    listed = ((entry.key.removeprefix(prefix), entry) for entry in reads.list(prefix))
    return {name for name, entry in listed if sizes.get(name) == entry.bytes and not entry.problem}


def _pieces(source: Reads, key: str, size: int) -> Iterator[bytes]:
    """A file, from its beginning, of a peer or a store."""
    if source.url.startswith("gs://"):
        from orchestrator.storage import gcs, gcs_objects  # they take longer to import than all else

        assert isinstance(source, gcs.GcsStorage)
        yield from gcs_objects.pieces(source, key)
    elif isinstance(source, PeerStorage):
        for offset in range(0, size, _PIECE_BYTES):
            buffer = bytearray(min(_PIECE_BYTES, size - offset))
            count = source.read_into(key, offset, memoryview(buffer))
            yield bytes(memoryview(buffer)[:count])
    elif isinstance(source, PosixStorage):
        yield from source.pieces(key)
    else:
        body = source.get(key, size)
        if body is None:
            raise StorageError(f"read {source.url}/{key}: is missing")
        yield body

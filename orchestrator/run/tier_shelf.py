"""What a tier server gives away and takes in: the directories of runs below one base. No network here; any thread.

Below the base everything is ours (`tier_directory.check`), and nothing else is read or written: names are validated,
links, special files and what somebody else owns are rejected. A copy is created once, whole, or not at all, and never
changed. It has been checked on arrival.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from absl import logging

from orchestrator.errors import Damaged, OrchestratorError, StorageError, Unavailable, UsageError
from orchestrator.rules import keys, peer_protocol
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.peer_protocol import Failure, Target
from orchestrator.rules.records import FileEntry
from orchestrator.run import survey, tier_directory
from orchestrator.run.checked_reads import journal_entry
from orchestrator.run.tier_room import NoRoom, Room
from orchestrator.storage import PosixStorage
from orchestrator.storage.directory import storage_error
from orchestrator.storage.pieces import checked
from orchestrator.storage.port import Exists

_STALE_S = 120.0  # four times as long as a sender may say nothing
_EPOCH = re.compile(r"epoch-([0-9]{4,18})")


class Rejected(Exception):
    """A request that is not carried out, and why."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.failure = Failure(kind, text)


@dataclass(frozen=True)
class Copy:
    """A file that comes from a peer, as declared."""

    target: Target
    bytes: int
    crc32c: str


class Shelf:
    """base: `<directory>/orchestrator-<uid>`. run: the only one that is served; None: all."""

    def __init__(self, base: str, run: str | None = None) -> None:
        self.base, self._run = base, run
        self._lock = threading.Lock()
        self._heads: dict[tuple[str, str], int] = {}  # a log's directory and its newest entry -> epoch

    def prepare(self) -> None:
        """Make the base, if it is not there. Raises UsageError for another name than that of a tier, StorageError."""
        name = f"orchestrator-{os.getuid()}"
        if os.path.basename(self.base) != name:
            raise UsageError(f"--directory={self.base}: expected a directory of the name {name}: whose tiers are here")
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.base, 0o700)
        except OSError as error:
            raise storage_error("make the tier's directory", self.base, error) from error
        tier_directory.check(self.base)

    def sweep(self) -> None:
        """Free what a server that was killed has left of copies on their way: they have no name, and nobody has written
        to them for a while. Only where no process of this host writes. Never raises."""
        with contextlib.suppress(OSError):
            runs = [self._run] if self._run else os.listdir(self.base)
            for path in [path for run in runs for path in self._directories(os.path.join(self.base, run))]:
                with contextlib.suppress(OSError, OrchestratorError):
                    tier_directory.check(path)
                    if not os.path.lexists(os.path.join(path, keys.JOURNAL)):
                        self._sweep(PosixStorage(path), time.time() - _STALE_S)

    def _sweep(self, part: PosixStorage, before_s: float) -> None:
        with part.root.directory(keys.TEMPORARY) as folder:
            for name in os.listdir(folder):
                if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < before_s:
                    os.unlink(name, dir_fd=folder)

    # Reading.

    def parts(self, run: str) -> dict[int, list[AttemptId]]:
        """Raises Rejected if there is no such run."""
        found = {}
        for path in self._directories(self._of_run(run)):
            try:
                tier_directory.check(path)
                found[tier_directory.process_of(path)] = sorted(survey.attempts(PosixStorage(path)))
            except StorageError as error:
                logging.warning("a part is left out: %s", error)
        return found

    def part(self, target: Target) -> PosixStorage:
        """Raises Rejected, StorageError."""
        self._of_run(target.run)
        path = self._path(target)
        if not os.path.lexists(path):
            raise Rejected("missing", f"nothing of {peer_protocol.part_name(target.process or 0)} is here")
        tier_directory.check(path)
        return PosixStorage(path)

    def open(self, target: Target) -> tuple[int, int]:
        """A descriptor of a file, for the caller to close, and its size. Raises Rejected, StorageError."""
        part = self.part(target)
        try:
            descriptor = part.root.open(target.key)
        except (FileNotFoundError, NotADirectoryError):
            raise Rejected("missing", "there is no such file here") from None
        except OSError as error:
            raise storage_error("read", part.root.shown(target.key), error) from error
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid():
            os.close(descriptor)
            raise Unavailable(f"{part.root.shown(target.key)}: belongs to user {found.st_uid}; not read")
        return descriptor, found.st_size

    def _of_run(self, run: str) -> str:
        path = os.path.join(self.base, run)
        if (self._run not in (None, run)) or not os.path.lexists(path):
            raise Rejected("missing", "nothing of this run is here")
        tier_directory.check(self.base)
        tier_directory.check(path)
        return path

    def _path(self, target: Target) -> str:
        assert target.process is not None
        return os.path.join(self.base, target.run, peer_protocol.part_name(target.process))

    def _directories(self, where: str) -> list[str]:
        return tier_directory.beside(os.path.join(where, "any"))

    # Taking in.

    def announce(self, run: str, epoch: int) -> None:
        """From now on, copies of older epochs are rejected, also by the next server here. Raises Rejected,
        StorageError."""
        if self._run not in (None, run):
            raise Rejected("missing", "another run than the one that is served here")
        where = os.path.join(self.base, run)
        with self._lock:
            if epoch <= self._announced(where):
                return
            try:
                for path in (self.base, where):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path, 0o700)
                    tier_directory.check(path)
                name = os.path.join(where, f"epoch-{epoch:04d}")
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
                for older in self._epochs(where):
                    if older < epoch:
                        os.unlink(os.path.join(where, f"epoch-{older:04d}"))
            except OSError as error:
                raise storage_error("announce an epoch in", where, error) from error

    def _epochs(self, where: str) -> list[int]:
        try:
            names = os.listdir(where)
        except FileNotFoundError:
            return []
        return [int(found[1]) for name in names if (found := _EPOCH.fullmatch(name))]

    def _announced(self, where: str) -> int:
        return max(self._epochs(where), default=0)

    def _epoch(self, run: str) -> int:
        """The newest that was announced, or is open in a log here. Raises StorageError."""
        where = os.path.join(self.base, run)
        logged = [self._logged(path) for path in self._directories(where)]
        return max([self._announced(where), *logged])

    def _logged(self, path: str) -> int:
        """Of the newest whole entry of a process's log; 0 if it has none."""
        try:
            entries = sorted(os.listdir(os.path.join(path, keys.JOURNAL)), reverse=True)
        except OSError:
            return 0
        for name in entries:
            version = keys.journal_version(keys.JOURNAL + name)
            if version is None:
                continue
            if (path, name) not in self._heads:
                try:
                    head = journal_entry(PosixStorage(path), keys.journal_key(version), version)
                except Damaged:
                    continue
                for old in [each for each in self._heads if each[0] == path]:
                    self._heads.pop(old, None)
                self._heads[path, name] = head.epoch
            return self._heads[path, name]
        return 0

    def _check_epoch(self, run: str, attempt: AttemptId) -> None:
        if (newest := self._epoch(run)) > attempt.epoch:
            text = f"epoch {newest} has been opened since"
            raise Rejected("fenced", f"{attempt.label}: fenced by epoch {newest}: {text}; nothing older is held here")

    def take(self, copy: Copy, pieces: Iterator[bytes | memoryview]) -> bool:
        """Create a copy of what `pieces` yields. False: the same bytes were here already. Raises Rejected,
        StorageError; then nothing of it is here."""
        found = AttemptId.in_key(copy.target.key)
        if self._run not in (None, copy.target.run):
            raise Rejected("missing", "another run than the one that is served here")
        if found is None:
            raise Rejected("unsafe", f"{copy.target.key!r}: is no file of an attempt; only those are copied")
        attempt = found[0]
        self._check_epoch(copy.target.run, attempt)
        path = self._path(copy.target)
        if os.path.lexists(path) and self._is_here(copy):
            return False
        known = FileEntry(path="", bytes=copy.bytes, crc32c=copy.crc32c)

        def arriving() -> Iterator[bytes | memoryview]:
            yield from checked(known, pieces, lambda found: _damaged(found, known))
            self._check_epoch(copy.target.run, attempt)  # just before it gets its name

        with self._room(copy, os.path.dirname(path)) as on_bytes:
            tier_directory.make(path)
            part = PosixStorage(path)
            outcome = part.copy("a peer's file", copy.target.key, on_bytes, arriving())
            if isinstance(outcome, Exists):
                if not self._is_here(copy):
                    raise Rejected("busy", "somebody else has brought it, and it was freed at the same time")
                return False
            part.make_durable([copy.target.key], {copy.target.key: known})
        try:
            self._check_epoch(copy.target.run, attempt)  # opened just before it got its name
        except Rejected:
            part.delete(copy.target.key)
            raise
        return True

    def _is_here(self, copy: Copy) -> bool:
        """Whether the same bytes are under the key. Raises Rejected if others are."""
        there = self.part(copy.target).measure(copy.target.key, copy.bytes)
        if there is None:
            return False
        if (there.bytes, there.crc32c) != (copy.bytes, copy.crc32c):
            text = f"has {there.bytes} bytes here, CRC-32C {there.crc32c or 'not asked'}"
            raise Rejected(
                "conflict", f"{text}; {copy.bytes} bytes, {copy.crc32c} were sent: another body is not taken"
            )
        return True

    @contextlib.contextmanager
    def _room(self, copy: Copy, run: str) -> Iterator[Callable[[int], None]]:
        """Room for a copy, as long as it comes in. Yields what is told how much of it has been written. Raises Rejected
        saying what is needed and what there is."""
        try:
            reserved = Room(run).reserve(copy.bytes)
        except NoRoom as error:
            text = f"a copy needs {copy.bytes} bytes, and there are {error.seen} on this host"
            raise Rejected("room", f"no room: {text}; give its tier more room, or hold fewer steps") from error
        try:
            yield reserved.written
        finally:
            reserved.end()


def _damaged(found: str, known: FileEntry) -> Rejected:
    return Rejected("damaged", f"{found} arrived, {known.bytes} with {known.crc32c} were sent; not taken")

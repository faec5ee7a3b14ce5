"""How much a run's tiers take on one host, and may take: by all its processes, its tier server and a prefetch together.

    <run>/room/limit     `bytes_max` of `oc.memory`, which those learn here who are not told: servers, and prefetches
    <run>/room/lock      locked while somebody looks at what is there and reserves
    <run>/room/<random>  a reservation: how much is still to come, and of which attempt's part

Whoever is going to write reserves it first, against what lies there at that moment and what others have reserved.
Whoever has made a reservation keeps it locked, so that it ends with that process at the latest. Any thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from orchestrator.errors import StorageError
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.run import tier_directory
from orchestrator.storage.directory import storage_error

_FOLDER, _LIMIT, _LOCK = "room", "limit", "lock"
_WAIT_S, _POLL_S = 5.0, 0.005
_here = threading.Lock()  # locks of files are a process's: among its threads this is one
_mine: dict[str, Reservation] = {}  # this process's; their files are not opened again, as closing one unlocks it


@dataclass(frozen=True)
class Seen:
    """What is there. limit: None if there is none. used: bytes of all files. free: what can be written in any case.
    coming: by attempt, what has been reserved and not been written yet; of None what is told of no attempt. attempts:
    bytes by attempt, of all parts and copies."""

    limit: int | None
    used: int
    free: int
    coming: Counter[AttemptId | None] = field(default_factory=Counter)
    attempts: Counter[AttemptId] = field(default_factory=Counter)

    @property
    def room(self) -> int:
        reserved = self.coming.total()
        return min(self.free, self.free if self.limit is None else self.limit - self.used) - reserved

    def of(self, attempt: AttemptId) -> int:
        """What an attempt takes, or is going to."""
        return self.attempts[attempt] + self.coming[attempt]

    def __str__(self) -> str:
        limit = "" if self.limit is None else f" of the {self.limit} of bytes_max"
        reserved = f" and {self.coming.total()} reserved" if self.coming.total() else ""
        return f"{max(0, self.room)}{limit} beside the {self.used} used{reserved} by all that holds steps there"


class NoRoom(StorageError):
    """seen: what there was."""

    def __init__(self, seen: Seen) -> None:
        super().__init__(f"there are {seen}")
        self.seen = seen


class Reservation:
    """`left` bytes are still to come; of an attempt's part, what lies there counts. path: of its file."""

    def __init__(self, path: str, left: int, part: str) -> None:
        self.path, self.left, self._part = path, left, part
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._pid = os.getpid()
        self._record()

    @property
    def text(self) -> str:
        return f"{self.left:020d} {self._part}"

    def _record(self) -> None:
        os.pwrite(self._descriptor, self.text.encode(), 0)

    def written(self, count: int) -> None:
        """So many bytes are there now."""
        self.left -= count
        self._record()

    def end(self) -> None:
        """What was to come is there, or does not come. Idempotent. Never raises."""
        with _here:
            if _mine.pop(self.path, None) and os.getpid() == self._pid:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
                os.close(self._descriptor)


class Room:
    """Of a run's tiers on this host. run: their directory, `<directory>/orchestrator-<uid>/<run>`. bytes_max: a limit
    for this object alone, beside the recorded one."""

    def __init__(self, run: str, bytes_max: int | None = None) -> None:
        self._run, self._bytes_max = run, bytes_max
        self._folder = os.path.join(run, _FOLDER)

    def record(self, bytes_max: int | None) -> None:
        """From now on this is the limit of all that write here. Raises StorageError."""
        path = os.path.join(self._folder, _LIMIT)
        with self._locked():
            if bytes_max is None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return
            with open(path + ".new", "w", encoding="ascii") as file:
                file.write(str(bytes_max))
            os.replace(path + ".new", path)

    def reserve(self, need: int, process: int = 0, attempt: AttemptId | None = None) -> Reservation:
        """For `need` bytes more; of a `process`'s part of an attempt, if one is named. Raises NoRoom, StorageError."""
        part = f"process-{process:05d}/{attempt.prefix}" if attempt else ""
        with self._locked():
            seen = self._look()
            if need > seen.room:
                raise NoRoom(seen)
            made = Reservation(os.path.join(self._folder, uuid.uuid4().hex), need, part)
            _mine[made.path] = made
            return made

    def measure(self) -> Seen:
        """What lies there, without what is reserved: writes nothing. Raises StorageError."""
        return self._measure(())

    def look(self) -> Seen:
        """Raises StorageError."""
        with self._locked():
            return self._look()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """No other thread and no other process of this host looks or reserves meanwhile."""
        tier_directory.make(self._folder)
        try:
            with _here:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(os.path.join(self._folder, _LOCK), flags, 0o600)
                try:
                    self._lock(descriptor)
                    yield
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise storage_error("look at the room in", self._run, error) from error

    def _lock(self, descriptor: int) -> None:
        until = time.monotonic() + _WAIT_S
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    text = f"another process has been looking at the room there for {_WAIT_S:g} s; is one stopped?"
                    raise StorageError(f"{self._run}: {text}") from None
            time.sleep(_POLL_S)

    def _look(self) -> Seen:
        return self._measure(list(self._reserved()))  # before what is there, so that nothing is missed

    def _measure(self, reserved: Sequence[tuple[int, str]]) -> Seen:
        found = _files(self._run)
        coming: Counter[AttemptId | None] = Counter()
        for left, part in reserved:
            there = sum(size for key, size in found.items() if part and key.startswith(part))
            coming[_attempt(part)] += max(0, left - there)
        attempts: Counter[AttemptId] = Counter()
        for key, size in found.items():
            if attempt := _attempt(key):
                attempts[attempt] += size
        free = tier_directory.free_bytes(self._run)
        return Seen(self._limit(), sum(found.values()), free, coming, attempts)

    def _limit(self) -> int | None:
        limits = [] if self._bytes_max is None else [self._bytes_max]
        path = os.path.join(self._folder, _LIMIT)
        with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
            text = file.read()
            if not text.isdecimal():
                raise StorageError(f"{path}: {text[:40]!r} is no number of bytes; remove this file")
            limits.append(int(text))
        return min(limits, default=None)

    def _reserved(self) -> Iterator[tuple[int, str]]:
        """How much of each, and of which part. Those of processes that are gone are removed."""
        for name in os.listdir(self._folder):
            path = os.path.join(self._folder, name)
            if name.startswith((_LIMIT, _LOCK)):
                continue
            if own := _mine.get(path):
                text = own.text
            elif not (text := _read_locked(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                continue
            left, _, part = text.partition(" ")
            if left.isdecimal():
                yield int(left), part


def _read_locked(path: str) -> str:
    """What is in a file that another process keeps locked; '' of one that none does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return ""
    except BlockingIOError:
        return os.pread(descriptor, 4096, 0).decode("ascii", "replace")
    finally:
        os.close(descriptor)


def _files(run: str) -> dict[str, int]:
    """Bytes by file below the directories of processes; a file of two names counts once."""
    found: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [entry.path for entry in os.scandir(run) if tier_directory.process_of(entry.path) >= 0]
    while waiting:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    if (about.st_dev, about.st_ino) not in seen:
                        seen.add((about.st_dev, about.st_ino))
                        found[os.path.relpath(entry.path, run)] = about.st_size
    return found


def _attempt(path: str) -> AttemptId | None:
    """Whose file, or directory, this is: `process-00003/steps/...`."""
    _, _, key = path.partition("/")
    found = AttemptId.in_key(key if not key.endswith("/") else f"{key}any") if key.startswith(keys.STEPS) else None
    return found[0] if found else None

"""Events as JSON lines, one file per process, in a directory beside the run's data; writing and reading them.

The log is for people and dashboards: nothing that decides about data reads it. So it may lose lines (a full queue, a
crash in mid-line), but it never blocks, never fails the job, and never grows beyond two files of
FILE_BYTES, and two of PULSE_BYTES, for each process: a full file replaces the one before it. What finds no room on a
full disk is kept and written when there is room again; meanwhile the file's time stamp alone shows that the process
lives.

`00003.jsonl` is process 3's, `00003.old.jsonl` what it wrote before. Its pulses, of which there are many and the newest
count, have files of their own (`00003.pulse.jsonl`), so that they do not push out what happened. A line is one JSON
object: `v` (1), `time` (seconds since the epoch, that host's clock), `event` (a name of `events.KINDS`), `process`,
`host`, `machine`, `epoch`, and the event's own fields.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import msgspec
from absl import logging

from orchestrator.errors import OrchestratorError, StorageError, UnsafeKey
from orchestrator.observe.events import KINDS, EpochOpened, Event, Pulse, name_of
from orchestrator.rules.attempt_id import parse_name
from orchestrator.storage import local_path
from orchestrator.storage.directory import Root, find

VERSION = 1
_FORMER = {"StoreRetried": {"event": "Retried", "what": "store"}}  # events of older logs, as they are read now
FILE_BYTES = 8 << 20
PULSE_BYTES = 1 << 20  # of pulses: half a day in two files
DIRECTORY = "events"  # below a run's root, where that is a directory
_QUEUE_MAX = 10_000
_UNWRITTEN_MAX = 1000  # kept while the disk is full, the newest
_READ_BYTES_MAX = 2 * FILE_BYTES  # of one file, from its end
_LEAST_BYTES = 4 << 10  # of one file, however many there are: a save
_OPENED = b'"event":"EpochOpened"'
# Beyond these a number says nothing: the year 5138, a million processes.
_MOST = {"time": 1e11, "process": 1e6, "process_count": 1e6}
_NUMBER_MAX = 1 << 60
_TEXT_MAX = 1 << 20
_CLOSE_S = 2.0
_FILE = re.compile(r"(\d{5,})(\.pulse)?(\.old)?\.jsonl")


@dataclass(frozen=True)
class LoggedEvent:
    """One event with where and when it happened. `time`: seconds since the epoch, by the clock of `machine`."""

    time: float
    process: int
    host: str
    machine: str
    epoch: int
    event: Event


def encode(line: LoggedEvent) -> bytes:
    where = {field.name: getattr(line, field.name) for field in fields(LoggedEvent) if field.name != "event"}
    own = {field.name: getattr(line.event, field.name) for field in fields(line.event)}
    return msgspec.json.encode({"v": VERSION, "event": name_of(line.event), **where, **own}) + b"\n"


def decode(text: bytes) -> LoggedEvent | None:
    """The line that `encode` wrote; None for one that is cut off, of another program, of an event unknown to this
    version, or with values that mean nothing."""
    try:
        parsed: dict[str, Any] = msgspec.json.decode(text, type=dict)
        parsed |= _FORMER.get(str(parsed.get("event")), {})
        kind = KINDS.get(str(parsed.get("event")))
        if kind is None or parsed.get("v") != VERSION or not all(map(_is_plausible, parsed, parsed.values())):
            return None
        # The `epoch` of EpochOpened is that of its line, which holds it once.
        event = msgspec.convert(parsed, type=kind)
        return LoggedEvent(**msgspec.convert(parsed, type=_Where).asdict(), event=event)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _is_plausible(name: str, value: object) -> bool:
    """Whether readers can compute with it. Numbers are counts, sizes, times and durations, -1 for none."""
    if isinstance(value, int | float):
        return -1 <= value <= _MOST.get(name, _NUMBER_MAX)
    if name == "attempt":
        try:
            parse_name(str(value))
        except (UnsafeKey, ValueError):
            return False
    return not isinstance(value, str) or len(value) <= _TEXT_MAX


class _Where(msgspec.Struct):
    time: float
    process: int
    host: str
    machine: str
    epoch: int

    def asdict(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)


for _kind in (_Where, *KINDS.values()):
    msgspec.json.Decoder(_kind)  # described while one thread is here, as in `records`


class EventLog:
    """Writes this process's events below `directory`, on a thread of its own. `write` may be called from any thread and
    never waits. `dropped`: events that were not written."""

    def __init__(
        self,
        directory: str,
        *,
        process: int,
        host: str,
        epoch: int,
        file_bytes: int = FILE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._root, base = find(os.path.abspath(directory))
        self._key = f"{base}/{process:05d}.jsonl".lstrip("/")
        self._pulse_key = f"{base}/{process:05d}.pulse.jsonl".lstrip("/")
        self._process, self._host, self._epoch = process, host, epoch
        self._machine = os.uname().nodename
        self._file_bytes, self._clock = file_bytes, clock
        self._waiting: queue.Queue[LoggedEvent | None] = queue.Queue(_QUEUE_MAX)
        self._failed = False
        self._unwritten: deque[bytes] = deque()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def write(self, event: Event, at: float | None = None) -> None:
        """`at`: when it happened, if not now."""
        line = LoggedEvent(
            self._clock() if at is None else at, self._process, self._host, self._machine, self._epoch, event
        )
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is waiting, for at most two seconds."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            pulse = isinstance(line.event, Pulse)
            if not pulse:
                self._unwritten.append(encode(line))
            try:
                while self._unwritten:
                    self._append(self._unwritten[0], self._key, self._file_bytes)
                    self._unwritten.popleft()
                if pulse:
                    self._append(encode(line), self._pulse_key, min(self._file_bytes, PULSE_BYTES))
                self._failed = False
            except (OSError, OrchestratorError) as error:  # a full disk must not end a training job
                self._keep(error, pulse)
        self.dropped += len(self._unwritten)

    def _keep(self, error: Exception, pulse: bool) -> None:
        """Something could not be written. A pulse is worth nothing later, but it is a sign of life now."""
        if not self._failed:
            logging.warning("%s: events are not written: %s", self._root.shown(self._key), error)
        self._failed = True
        if len(self._unwritten) > _UNWRITTEN_MAX:
            self._unwritten.popleft()
            self.dropped += 1
        if pulse:
            self.dropped += 1
            folder, _, name = self._pulse_key.rpartition("/")
            with contextlib.suppress(OSError, OrchestratorError), self._root.directory(folder) as directory:
                os.utime(name, dir_fd=directory, follow_symlinks=False)  # takes no room

    def _append(self, body: bytes, key: str, file_bytes: int) -> None:
        self._root.ready()
        folder, _, name = key.rpartition("/")
        with self._root.directory(folder, make=True, durable=False) as directory:
            # Opened each time: another incarnation may have put a new file in its place, and a network file system
            # shows others only what was closed.
            descriptor = self._opened(directory, name, key)
            try:
                size = os.fstat(descriptor).st_size
                if size and size + len(body) > file_bytes:
                    former = name.removesuffix(".jsonl") + ".old.jsonl"
                    os.replace(name, former, src_dir_fd=directory, dst_dir_fd=directory)
                    os.close(descriptor)
                    descriptor, size = self._opened(directory, name, key), 0
                if os.write(descriptor, body) < len(body):
                    os.ftruncate(descriptor, size)  # half a line would spoil the next one, too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)

    def _opened(self, directory: int, name: str, key: str) -> int:
        return self._root.open_in(directory, name, key, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def directory_of(url: str, chosen: str | None) -> str | None:
    """Where the events of the run at storage `url` are: `chosen`, or `events` below a root on a file system. None:
    nowhere ('' chosen, or an object store, which has no appending)."""
    if chosen is not None:
        return os.path.expanduser(chosen) or None
    root = local_path(url)
    return None if root is None else os.path.join(root, DIRECTORY)


def read(directory: str | None) -> list[LoggedEvent]:
    """All events in `directory`, by time; [] if there are none. Lines that cannot be read are left out."""
    return Tail(directory).more(whole=False)


@dataclass(frozen=True)
class Reach:
    """How much is read of what is there already, from its end. `each_bytes`: of a process's events, and as much of its
    pulses. `all_bytes`: of all processes together, a quarter of it pulses; process 0, which has a part in all that
    happens, is read as far as `each_bytes` goes, however many others there are."""

    each_bytes: int
    all_bytes: int

    def of(self, process: int, pulse: bool, processes: int) -> int:
        if process == 0:
            return self.each_bytes
        share = self.all_bytes // max(1, processes)
        return min(self.each_bytes, max(_LEAST_BYTES, share // 4 if pulse else share * 3 // 4))


EVERYTHING = Reach(1 << 60, 1 << 60)
# Of a few hosts the last few hundred saves and the pulses of half an hour; of 1000 the last save or two.
RECENT = Reach(256 << 10, 16 << 20)
# Of ten hosts everything, of 1000 the last sixty saves.
HISTORY = Reach(2 * FILE_BYTES, 128 << 20)


class Tail:
    """The events of `directory` as they come: `more` returns those since the last call. Reads each byte once.
    `reach`: of the files that are there already; of what is before it, only how process 0 opened its last incarnation.

    `skipped`: lines so far that are no events. `problems`: by name of a file, why it, or the beginning of it, is not
    read. `newest`: process -> when the file that it writes was last changed, by the file system's clock. `cut_at`:
    process -> the time of the first event of it that was read, where there are more before `reach`.
    """

    def __init__(self, directory: str | None, reach: Reach = EVERYTHING) -> None:
        self._directory, self._reach = directory, reach
        self._seen: dict[tuple[int, int], int] = {}  # (device, inode) -> bytes read; a full file changes its name
        self.skipped = 0
        self.problems: dict[str, str] = {}
        self.newest: dict[int, float] = {}
        self.cut_at: dict[int, float] = {}
        self._first: dict[int, float] = {}  # process -> the time of its first event that was read

    def more(self, whole: bool = True) -> list[LoggedEvent]:
        """By time. `whole`: a last line without its end is being written, and left for the next call."""
        if self._directory is None:
            return []
        root, base = find(os.path.abspath(self._directory))
        lines: list[LoggedEvent] = []
        try:
            with root.directory(base) as directory:
                names = sorted(filter(_FILE.fullmatch, os.listdir(directory)))
                left = self._reaches(names)
                for name in names:  # a file before the one that it was replaced by
                    try:
                        lines += self._lines(root, directory, name, f"{base}/{name}".lstrip("/"), whole, left)
                    except FileNotFoundError:  # replaced this moment
                        continue
                    except (OSError, StorageError) as error:
                        self.problems[name] = str(error)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, StorageError) as error:
            self.problems[""] = str(error)
        return sorted(lines, key=lambda line: line.time)

    def _reaches(self, names: Iterable[str]) -> dict[tuple[int, bool], int]:
        """(process, whether pulses) -> how many bytes of its files may be read that have not been seen before."""
        kinds = {_kind_of(name) for name in names}
        processes = len({process for process, _ in kinds})
        return {(process, pulse): self._reach.of(process, pulse, processes) for process, pulse in kinds}

    def _lines(
        self, root: Root, directory: int, name: str, key: str, whole: bool, left: dict[tuple[int, bool], int]
    ) -> list[LoggedEvent]:
        process, pulse = kind = _kind_of(name)
        descriptor = root.open_in(directory, name, key, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            inode = (status.st_dev, status.st_ino)
            new, first = inode not in self._seen, self._seen.get(inode, 0)
            before = b""
            if new and status.st_size > left[kind]:
                first = status.st_size - left[kind]
                before = _last_opened(descriptor, first) if process == 0 and not pulse else b""
            elif status.st_size - first > _READ_BYTES_MAX:
                first = status.st_size - _READ_BYTES_MAX
                self.problems[name] = f"{root.shown(key)}: only the last {_READ_BYTES_MAX} of its bytes are read"
            body = _read(descriptor, first, status.st_size - first)
        finally:
            os.close(descriptor)
        if not name.endswith(".old.jsonl"):
            self.newest[process] = max(status.st_mtime, self.newest.get(process, 0.0))
        if whole:
            body = body[: body.rfind(b"\n") + 1]
        self._seen[inode] = first + len(body)
        if new:
            left[kind] = max(0, left[kind] - len(body))
        cut = new and first > 0
        mine = self._decoded(body[body.find(b"\n") + 1 :] if cut else body)  # not from the middle of a line
        if mine and not pulse:
            self._first[process] = min(mine[0].time, self._first.get(process, mine[0].time))
        if cut and not pulse and process in self._first:
            self.cut_at[process] = self._first[process]
        return [*self._decoded(before), *mine]

    def _decoded(self, body: bytes) -> list[LoggedEvent]:
        lines = [decode(text) for text in body.splitlines()]
        found = [line for line in lines if line]
        self.skipped += len(lines) - len(found)
        return found


def _kind_of(name: str) -> tuple[int, bool]:
    """(process, whether it is of its pulses) of a file of events."""
    found = _FILE.fullmatch(name)
    assert found
    return int(found[1]), bool(found[2])


def _last_opened(descriptor: int, end: int) -> bytes:
    """The last line before `end` that says how an incarnation began; b'' if there is none."""
    first = max(0, end - _READ_BYTES_MAX)
    text = _read(descriptor, first, end - first)
    at = text.rfind(_OPENED)
    stop = text.find(b"\n", at) + 1
    return text[text.rfind(b"\n", 0, at) + 1 : stop] if at >= 0 and stop else b""


def _read(descriptor: int, first: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(descriptor, size, first)):
        parts.append(part)
        first, size = first + len(part), size - len(part)
    return b"".join(parts)


def epochs(lines: Iterable[LoggedEvent]) -> dict[int, EpochOpened]:
    """Epoch -> how process 0 opened it."""
    return {line.epoch: line.event for line in lines if isinstance(line.event, EpochOpened) and line.process == 0}

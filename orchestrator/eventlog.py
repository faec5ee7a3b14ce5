"""Events as JSON lines, one file per process, in a directory beside the run's data; writing and reading them.

The log is for people and dashboards: nothing that decides about data reads it. So it may lose lines (a full queue, a
full disk, a crash in mid-line), but it never blocks, never fails the job, and never grows beyond two files of
FILE_BYTES for each process: a full file replaces the one before it.

`00003.jsonl` is process 3's, `00003.old.jsonl` what it wrote before. A line is one JSON object: `v` (1), `time`
(seconds since the epoch, that host's clock), `event` (a name of `events.KINDS`), `process`, `host`, `machine`, `epoch`,
and the event's own fields.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
from absl import logging

from orchestrator.events import KINDS, EpochOpened, Event

VERSION = 1
_FORMER = {"StoreRetried": {"event": "Retried", "what": "store"}}  # events of older logs, as they are told now
FILE_BYTES = 8 << 20
DIRECTORY = "events"  # below a run's root, where that is a directory
_QUEUE_MAX = 10_000
_CLOSE_S = 2.0
_FILE = re.compile(r"\d{5,}(\.old)?\.jsonl")


@dataclass(frozen=True)
class Line:
    """One event with where and when it happened. `time`: seconds since the epoch, by the clock of `machine`."""

    time: float
    process: int
    host: str
    machine: str
    epoch: int
    event: Event


def encode(line: Line) -> bytes:
    where = {field.name: getattr(line, field.name) for field in fields(Line) if field.name != "event"}
    own = {field.name: getattr(line.event, field.name) for field in fields(line.event)}
    return msgspec.json.encode({"v": VERSION, "event": type(line.event).__name__, **where, **own}) + b"\n"


def decode(text: bytes) -> Line | None:
    """The line that `encode` wrote; None for one that is cut off, foreign, or of an event unknown to this version."""
    try:
        said: dict[str, Any] = msgspec.json.decode(text, type=dict)
        said |= _FORMER.get(str(said.get("event")), {})
        kind = KINDS.get(str(said.get("event")))
        if kind is None or said.get("v") != VERSION:
            return None
        # `epoch` of EpochOpened is the line's own, said once.
        event = msgspec.convert(said, type=kind)
        return Line(**msgspec.convert(said, type=_Where).asdict(), event=event)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


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
        self._path = os.path.join(directory, f"{process:05d}.jsonl")
        self._process, self._host, self._epoch = process, host, epoch
        self._machine = os.uname().nodename
        self._file_bytes, self._clock = file_bytes, clock
        self._waiting: queue.Queue[Line | None] = queue.Queue(_QUEUE_MAX)
        self._failed = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def write(self, event: Event, at: float | None = None) -> None:
        """`at`: when it happened, if not now."""
        line = Line(self._clock() if at is None else at, self._process, self._host, self._machine, self._epoch, event)
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
            try:
                self._append(encode(line))
            except OSError as error:  # a full disk must not end a training job
                self.dropped += 1
                if not self._failed:
                    logging.warning("%s: events are not written: %s", self._path, error)
                self._failed = True

    def _append(self, body: bytes) -> None:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        # Opened anew each time: another incarnation may have put a new file in its place, and a network file system
        # shows others only what was closed.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and size + len(body) > self._file_bytes:
                os.replace(self._path, self._path.removesuffix(".jsonl") + ".old.jsonl")
                os.close(descriptor)
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                size = 0
            os.write(descriptor, body)
        finally:
            os.close(descriptor)


def directory_of(url: str, chosen: str | None) -> str | None:
    """Where the events of the run at storage `url` are: `chosen`, or `events` below a root on a file system. None:
    nowhere ('' chosen, or an object store, which has no appending)."""
    if chosen is not None:
        return os.path.expanduser(chosen) or None
    return os.path.join(url.removeprefix("file://"), DIRECTORY) if url.startswith("file://") else None


def read(directory: str | None) -> list[Line]:
    """All events in `directory`, by time; [] if there are none. Lines that cannot be read are left out."""
    if directory is None or not os.path.isdir(directory):
        return []
    bodies = (path.read_bytes() for path in sorted(Path(directory).iterdir()) if _FILE.fullmatch(path.name))
    return parse(line for body in bodies for line in body.splitlines())


def parse(texts: Iterable[bytes]) -> list[Line]:
    lines = (decode(text) for text in texts)
    return sorted((line for line in lines if line), key=lambda line: line.time)


class Tail:
    """The events of `directory` as they come: `more` returns those since the last call. Reads each byte once."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._seen: dict[tuple[int, int], int] = {}  # (device, inode) -> bytes read; a full file changes its name

    def more(self) -> list[Line]:
        if self._directory is None or not os.path.isdir(self._directory):
            return []
        texts: list[bytes] = []
        for path in sorted(Path(self._directory).iterdir()):
            if _FILE.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # replaced this moment
                    status = os.fstat(file.fileno())
                    inode = (status.st_dev, status.st_ino)
                    file.seek(self._seen.get(inode, 0))
                    body = file.read()
                    whole = body[: body.rfind(b"\n") + 1]  # the rest is being written
                    self._seen[inode] = self._seen.get(inode, 0) + len(whole)
                    texts += whole.splitlines()
        return parse(texts)


def epochs(lines: Iterable[Line]) -> dict[int, EpochOpened]:
    """Epoch -> how process 0 opened it."""
    return {line.epoch: line.event for line in lines if isinstance(line.event, EpochOpened) and line.process == 0}

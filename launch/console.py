"""The launcher's two streams, written so that nobody who does not read them can hold up or end a job.

A stopped terminal, a pager or a full pipe blocks whoever writes, a reader that has left (`| head`) or a closed terminal
fails every write. So the supervisor only puts lines into a queue; one thread per stream writes them, and may wait for
ever. The streams are not made non-blocking: they are shared with whoever started us.

A reader that is slow loses nothing: `behind` asks the supervisor not to read more of the hosts' output meanwhile. One
that takes nothing for STALL_S is not waited for: lines are dropped then, counted, and the count is shown where they
would have been.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from orchestrator.texts import printable

MOST_BYTES = 1 << 20
STALL_S = 2.0
BATCH_BYTES = 64 * 1024
WRITE_BYTES = 4096  # so that each page a pager takes counts as progress
NOBODY = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET})


class Stream:
    """One file descriptor and the thread that writes to it. `put`, `behind`, `drain` never wait for a reader longer
    than they say; any thread may call them. `gone(why)` is called once, on the writer's thread."""

    def __init__(self, descriptor: int | None, gone: Callable[[str], None] = lambda why: None) -> None:
        self._descriptor, self._gone = descriptor, gone
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._missed = 0  # lines dropped since the last that was taken
        self._moved_s = time.monotonic()
        self._changed = threading.Condition()
        self._closed = descriptor is None
        if descriptor is not None:
            threading.Thread(target=self._write_all, args=(descriptor,), daemon=True, name="console").start()

    def put(self, line: bytes) -> None:
        """Queue a line, with its line break, or count it as not shown."""
        with self._changed:
            if self._closed:
                return
            if self._is_full():
                self._missed += 1
                return
            if self._missed:
                self._queue(f"[launch] {self._missed} lines not shown, as nobody read them\n".encode())
                self._missed = 0
            self._queue(line)

    def behind(self) -> bool:
        """True while a reader that still reads should be given time."""
        with self._changed:
            return self._bytes > MOST_BYTES and not self._is_full()

    def drain(self, patience_s: float) -> int:
        """Wait until all is written, or for `patience_s` without progress. Returns the number of lines not shown."""
        with self._changed:
            end = time.monotonic() + patience_s
            while self._lines and not self._closed and time.monotonic() < end:
                moved_s = self._moved_s
                self._changed.wait(0.05)
                if self._moved_s != moved_s:
                    end = time.monotonic() + patience_s
            return 0 if self._closed else self._missed + len(self._lines)

    def _is_full(self) -> bool:
        if self._missed:
            return self._bytes > MOST_BYTES // 2
        stalled = time.monotonic() - self._moved_s > STALL_S
        return self._bytes > (MOST_BYTES if stalled else 4 * MOST_BYTES)

    def _queue(self, line: bytes) -> None:
        if not self._lines:
            self._moved_s = time.monotonic()
        self._lines.append(line)
        self._bytes += len(line)
        self._changed.notify_all()

    def _write_all(self, descriptor: int) -> None:
        # A terminal may be set to stop the jobs in its background that write to it: not a supervisor.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        while True:
            with self._changed:
                while not self._lines:
                    self._changed.wait()
                lines, size = list[bytes](), 0
                for line in self._lines:  # they stay in the queue until they are written
                    if lines and size + len(line) > BATCH_BYTES:
                        break
                    lines.append(line)
                    size += len(line)
            why = self._write(descriptor, b"".join(lines))
            with self._changed:
                for _ in lines:
                    self._lines.popleft()
                self._bytes -= size
                self._closed = why is not None
                if self._closed:
                    self._lines.clear()
                self._changed.notify_all()
            if why is not None:
                self._gone(why)
                return

    def _write(self, descriptor: int, line: bytes) -> str | None:
        """Write all of it. Returns why nobody can be reached by this stream any more, if so."""
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(descriptor, rest[:WRITE_BYTES]) :]
            except BlockingIOError:  # somebody else has made the shared stream non-blocking
                select.select([], [descriptor], [], 1.0)
                continue
            except OSError as error:
                if error.errno in NOBODY:
                    return os.strerror(error.errno)
                with self._changed:  # a full disk: it may have room again
                    self._missed += bytes(rest).count(b"\n")
                return None
            with self._changed:
                self._moved_s = time.monotonic()
        return None


def _descriptor(stream: TextIO | None) -> int | None:
    """None if there is no such stream: closed when we were started, or a test's."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


class Console:
    """Standard output for the hosts' lines, standard error for the launcher's own words."""

    def __init__(self) -> None:
        self._errors = Stream(_descriptor(sys.stderr))
        self._output = Stream(_descriptor(sys.stdout), self._gone)

    def line(self, host: str, text: str) -> None:
        self._output.put(f"[{host}] {text}\n".encode(errors="replace"))

    def note(self, text: str) -> None:
        self._errors.put(f"[launch] {printable(text, details=True)}\n".encode(errors="replace"))

    def behind(self) -> bool:
        return self._output.behind()

    def close(self, patience_s: float) -> None:
        """Give readers a last chance, for `patience_s` without progress."""
        if missed := self._output.drain(patience_s):
            self.note(f"{missed} last lines were not shown, as nobody read standard output; --log_dir keeps all")
        self._errors.drain(min(patience_s, 1.0))

    def _gone(self, why: str) -> None:
        self.note(f"standard output: {why}; the job goes on, its output is kept by --log_dir only")

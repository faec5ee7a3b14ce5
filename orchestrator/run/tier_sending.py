"""Sending files of this host's tiers to the tier servers of other hosts, on a few threads, within a limit.

The bytes go from the page cache to the network (`sendfile`), and through no interpreter. A target that answers before
it has all of a file (it rejects it, or has it) is heard at once.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace

import crc32c

from orchestrator.errors import OrchestratorError, StorageError, Unavailable
from orchestrator.rules import peer_protocol
from orchestrator.rules.peer_protocol import Failure, Progress, Request, Sending, Target
from orchestrator.run.tier_shelf import Rejected, Shelf
from orchestrator.storage.peer_http import Wire, raise_failure

_THREADS = 8
_PIECE_BYTES = 1 << 20
_BURST_S = 0.05  # of a limit, that may be sent at once
_TOLD_EVERY_S = 1.0
_TARGETS_MAX = 64


class TokenBucket:
    """So many bytes a second, whoever sends them. Any thread."""

    def __init__(self, bytes_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock, self._lock = clock, threading.Lock()
        self._free_at = clock()

    def take(self, count: int) -> float:
        """How long to wait before `count` bytes are sent; they count as sent."""
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - _BURST_S)
            self._free_at = begin + count / self.bytes_per_s
            return max(0.0, begin - now)


class Sender:
    """moved: bytes sent and read for it, ever: whether anything goes on."""

    def __init__(self, shelf: Shelf, secret: bytes, deadline_s: float) -> None:
        self._shelf, self._secret, self._deadline_s = shelf, secret, deadline_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="send")
        self._lock = threading.Lock()
        self._wires: dict[str, Wire] = {}
        self._buckets: dict[tuple[str, int | None], TokenBucket] = {}
        self.moved = 0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def run(self, part: Target, sending: Sending, cancelled: threading.Event) -> Iterator[Progress]:
        """Send; yields about once a second how it goes on, and last `done` or the failure."""
        try:
            wires = [self._wire(address) for address in sending.to[:_TARGETS_MAX]]
            bucket = self._bucket(part, sending.bytes_per_s)
        except OrchestratorError as error:
            yield Progress(failure=Failure("bad", str(error)))
            return
        jobs: list[Future[None]] = [
            self._pool.submit(self._send, Target(part.run, part.process, key), wires, bucket, cancelled)
            for key in sending.keys
        ]
        pending = set(jobs)
        try:
            while pending:
                done, pending = wait(pending, _TOLD_EVERY_S, FIRST_COMPLETED)
                for job in done:
                    if failure := _failure(job):
                        yield Progress(self.moved, failure=failure)
                        return
                if not done:
                    yield Progress(self.moved)
            yield Progress(self.moved, done=True)
        finally:
            cancelled.set()
            for job in pending:
                job.cancel()

    def _wire(self, address: str) -> Wire:
        with self._lock:
            if address not in self._wires:
                self._wires[address] = Wire(address, self._secret, self._deadline_s)
            return self._wires[address]

    def _bucket(self, part: Target, bytes_per_s: int | None) -> TokenBucket | None:
        if bytes_per_s is None:
            return None
        key = (part.run, part.process)
        with self._lock:
            found = self._buckets.get(key)
            if found is None or found.bytes_per_s != bytes_per_s:
                found = self._buckets[key] = TokenBucket(max(1, bytes_per_s))
            return found

    def _count(self, moved: int) -> None:
        with self._lock:
            self.moved += moved

    def _send(
        self, target: Target, wires: Sequence[Wire], bucket: TokenBucket | None, cancelled: threading.Event
    ) -> None:
        """A file to all targets, one after another. Raises Rejected, StorageError."""
        slowest, query = peer_protocol.SLOWEST_BYTES_PER_S, {}
        if bucket and bucket.bytes_per_s < slowest * 2 * _THREADS:  # all files at once share it
            slowest = max(1, bucket.bytes_per_s // (2 * _THREADS))
            query = {"slowest": str(slowest)}
        descriptor, size = self._shelf.open(target)
        try:
            checksum = self._checksum(descriptor, size)
            for wire in wires:
                if cancelled.is_set():
                    return
                flow = _Flow(descriptor, size, bucket, cancelled, self._count, self._deadline_s)
                request = Request("PUT", replace(target, query=query).encode(), "", size, checksum)
                with wire.exchange("copy to", request, flow.send, slowest_bytes_per_s=slowest) as reply:
                    where = f"copy {target.path} to {wire.address}"
                    if reply.status != 200:
                        raise_failure(where, reply.failure())
                    reply.read()
        finally:
            os.close(descriptor)

    def _checksum(self, descriptor: int, size: int) -> str:
        checksum = done = 0
        buffer = bytearray(min(size, _PIECE_BYTES))
        while done < size:
            count = os.preadv(descriptor, [buffer], done)
            if not count:
                raise StorageError("the file was cut short while it was read")
            checksum = crc32c.crc32c(memoryview(buffer)[:count], checksum)
            done += count
            self._count(count)
        return f"{checksum:08x}"


class _Flow:
    """The body of one request, from a file."""

    def __init__(
        self,
        descriptor: int,
        size: int,
        bucket: TokenBucket | None,
        cancelled: threading.Event,
        count: Callable[[int], None],
        stall_s: float,
    ) -> None:
        self._descriptor, self._size, self._bucket = descriptor, size, bucket
        self._cancelled, self._count, self._stall_s = cancelled, count, stall_s

    def send(self, connection: socket.socket) -> bool:
        """False if there is an answer before all is sent. Raises OSError, TimeoutError where nothing moves."""
        connection.settimeout(self._stall_s)  # the descriptor does not block
        ready = select.poll()
        ready.register(connection, select.POLLIN | select.POLLOUT)
        offset = 0
        while offset < self._size:
            piece = min(_PIECE_BYTES, self._size - offset)
            if self._bucket:
                piece = min(piece, max(1, self._bucket.bytes_per_s // 8))
                self._cancelled.wait(self._bucket.take(piece))
            if self._cancelled.is_set():
                raise ConnectionAbortedError("another file of the same request has failed")
            until = offset + piece
            while offset < until:
                events = ready.poll(self._stall_s * 1000)
                if not events:
                    raise TimeoutError(f"it has taken no byte for {self._stall_s:g} s")
                if events[0][1] & select.POLLIN:
                    return False
                try:
                    sent = os.sendfile(connection.fileno(), self._descriptor, offset, until - offset)
                except BlockingIOError:
                    continue
                if not sent:
                    raise ConnectionAbortedError("the file was cut short while it was sent")
                offset += sent
                self._count(sent)
        return True


def _failure(job: Future[None]) -> Failure | None:
    match job.exception():
        case None:
            return None
        case Rejected() as error:
            return error.failure
        case StorageError() as error:
            return Failure("unavailable" if isinstance(error, Unavailable) else "storage", str(error))
        case error:
            return Failure("unavailable", f"{type(error).__name__}: {error}")

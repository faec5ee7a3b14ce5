"""Another host's tier as a store: what its tier server (`run/tier_server`) gives to this process.

A part is what one process wrote, or the copy of it; read it as any `Reads`, or straight into a buffer. Nothing of what
a peer delivers is believed by itself: whoever reads checks it against the manifest. Any thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules import peer_protocol
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import check_key
from orchestrator.rules.peer_protocol import ListPage, Measured, Parts, Progress, Request, Sending, Target
from orchestrator.rules.records import FileEntry, crc32c
from orchestrator.storage.peer_http import Reply, Wire, raise_failure
from orchestrator.storage.port import Entry, Gone, TooLarge

_DEADLINE_S = 30.0
_MEASURED_BYTES_PER_S = 50 << 20  # at least, by a server that has other things to do


class Peer:
    """A host's tier server, at `address` ('host:port', '[::1]:port'). deadline_s: how long it may say nothing."""

    def __init__(self, address: str, secret: bytes, run: str, deadline_s: float = _DEADLINE_S) -> None:
        self.address, self.run = address, run
        self._wire = Wire(address, secret, deadline_s)
        self.url = f"http://{address}/{run}"

    def __repr__(self) -> str:
        return f"Peer({self.url!r})"

    def close(self) -> None:
        """End connections that nobody uses. It can be used again."""
        self._wire.close()

    def part(self, process: int) -> PeerStorage:
        return PeerStorage(self._wire, Target(self.run, process))

    def parts(self) -> dict[int, list[AttemptId]]:
        """Attempts of which there are files, oldest first, by the process that wrote them. Raises Unavailable."""
        with self._wire.exchange("list", Request("GET", Target(self.run).encode())) as reply:
            if reply.status == 404:
                reply.read()
                return {}
            body = _expect(reply, f"list {self.url}", 200).read()
        found = _decoded(f"list {self.url}", body, Parts)
        return {process: [AttemptId(*each) for each in attempts] for process, attempts in found.parts.items()}

    def announce(self, epoch: int) -> None:
        """Incarnation `epoch` holds from now on: copies of what older ones hold are rejected. Raises Unavailable."""
        target = Target(self.run, query={"epoch": str(epoch)})
        with self._wire.exchange("announce", Request("PUT", target.encode())) as reply:
            _expect(reply, f"announce epoch {epoch} to {self.url}", 200).read()

    def send(self, process: int, keys: Sequence[str], to: Sequence[str], bytes_per_s: int | None = None) -> None:
        """Have this server send files of a part to the servers at `to`. When it returns, all of them have all files,
        with the size and the CRC-32C that they have here. bytes_per_s: what the copies of this part may take of the
        network. Raises StorageError naming the peer, the file and why: no room, another body or a newer epoch there;
        Unavailable where one does not answer."""
        for key in keys:
            check_key(key, self.url)
        what = f"send files of {peer_protocol.part_name(process)}"
        body = peer_protocol.encode(Sending(list(keys), list(to), bytes_per_s))
        request = Request("POST", Target(self.run, process).encode(), "", len(body), crc32c(body))
        with self._wire.exchange(what, request, body, endless=True) as reply:
            _expect(reply, f"{what} from {self.url}", 200)
            self._follow(what, reply)

    def _follow(self, what: str, reply: Reply) -> None:
        """Read a line a second until the last; each must come within the deadline."""
        moved, since = -1, time.monotonic()
        while line := reply.line():
            progress = _decoded(f"{what} from {self.url}", line, Progress)
            if progress.failure:
                raise_failure(what, progress.failure)
            if progress.done:
                reply.read_into(memoryview(bytearray(1)))  # the end of the body: the connection can be kept
                return
            if progress.moved != moved:
                moved, since = progress.moved, time.monotonic()
            elif time.monotonic() - since > 2 * self._wire.deadline_s:
                raise Unavailable(f"{what} from {self.url}: nothing has moved for {2 * self._wire.deadline_s:g} s")
        raise Unavailable(f"{what}: the tier server at {self.address} ended before all was sent")


class PeerStorage:
    """The files of one part, as `Reads`."""

    def __init__(self, wire: Wire, part: Target) -> None:
        assert part.process is not None
        self._wire, self._part = wire, part
        self.process = part.process
        self.url = f"http://{wire.address}/{part.path}"

    def __repr__(self) -> str:
        return f"PeerStorage({self.url!r})"

    def _target(self, key: str, **query: str) -> str:
        target = Target(self._part.run, self._part.process, check_key(key, self.url) if key else "", query).encode()
        if len(target) > peer_protocol.TARGET_CHARS_MAX:
            raise StorageError(f"{self.url}/{key[:80]}...: a name of {len(target)} characters; not asked for")
        return target

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        check_key(key, self.url)
        with self._wire.exchange("read", Request("GET", self._target(key)), answer_bytes=most_bytes) as reply:
            if reply.status == 404:
                reply.read()
                return None
            _expect(reply, f"read {self.url}/{key}", 200)
            if reply.length is not None and reply.length > most_bytes:
                raise TooLarge(f"{self.url}/{key}", reply.length, most_bytes)
            return reply.read(most_bytes)

    def read_into(self, key: str, offset: int, view: memoryview) -> int:
        """As `os.preadv`: bytes from `offset` on into `view` (of bytes, contiguous). Returns how many; fewer than it
        holds only at the file's end. Raises Gone, Unavailable."""
        check_key(key, self.url)
        size = len(view)
        if not size:
            return 0
        request = Request("GET", self._target(key), f"bytes={offset}-{offset + size - 1}")
        with self._wire.exchange("read", request, answer_bytes=size) as reply:
            if reply.status == 416:  # begins at its end, or after it
                reply.read()
                return 0
            _expect(reply, f"read {self.url}/{key}", 206)
            length = reply.length or 0
            if not 0 < length <= size:
                raise Unavailable(f"read {self.url}/{key}: an answer of {length} bytes to a request for {size}")
            if (got := reply.read_into(view[:length])) != length:
                text = f"ends after {got} of {length} bytes at {offset}"
                raise Unavailable(f"read {self.url}/{key}: the answer {text}: the peer is gone, or cut off")
            return got

    def size(self, key: str) -> int | None:
        """None if there is no such file. Raises Unavailable."""
        check_key(key, self.url)
        with self._wire.exchange("look at", Request("HEAD", self._target(key))) as reply:
            if reply.status == 404:
                return None
            if reply.status != 200:  # without a body that would say why
                raise Unavailable(f"look at {self.url}/{key}: HTTP {reply.status}")
            return int(reply.header("Content-Length"))

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        size = self.size(key)
        if size is None:
            return None
        if expected_bytes is not None and size != expected_bytes:
            return FileEntry(path=key, bytes=size, crc32c="")
        request = Request("GET", self._target(key, measure=""))
        stall_s = self._wire.deadline_s + size / _MEASURED_BYTES_PER_S
        with self._wire.exchange("measure", request, stall_s=stall_s, answer_bytes=size) as reply:
            if reply.status == 404:
                reply.read()
                return None
            found = _decoded(
                f"measure {self.url}/{key}", _expect(reply, f"measure {self.url}/{key}", 200).read(), Measured
            )
        return FileEntry(path=key, bytes=found.bytes, crc32c=found.crc32c, crc32=found.crc32)

    def _listed(self, prefix: str, start: str) -> list[Entry]:
        found: list[Entry] = []
        while True:
            request = Request("GET", self._target("", list=prefix, start=start))
            with self._wire.exchange("list", request) as reply:
                if reply.status == 404:
                    reply.read()
                    return found
                body = _expect(reply, f"list {self.url}/{prefix}", 200).read()
            page = _decoded(f"list {self.url}/{prefix}", body, ListPage)
            found += [Entry(*each) for each in page.entries if not found or each[0] > found[-1].key]
            if not page.more or not found or found[-1].key <= start:
                return found
            start = found[-1].key

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        return iter(self._listed(prefix, start))


def _expect(reply: Reply, where: str, status: int) -> Reply:
    """`reply`, if it has this status. Raises what the server says instead."""
    if reply.status == status:
        return reply
    failure = reply.failure()
    if failure.kind == "missing":
        raise Gone(f"{where}: {failure.text}")
    raise_failure(where, failure)
    raise AssertionError("unreachable")


def _decoded(where: str, body: bytes, kind: type[peer_protocol.Body]) -> peer_protocol.Body:
    found = peer_protocol.decode(body, kind)
    if found is None:
        raise Unavailable(f"{where}: an answer that nobody expects: {body[:80]!r}")
    return found

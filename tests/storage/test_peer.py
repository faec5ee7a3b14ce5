"""Another host's tier as a store: the client, against a tier server that is a program of its own."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import StorageError, Unavailable, UsageError
from orchestrator.rules import peer_protocol
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import crc32c
from orchestrator.run.tier_sending import TokenBucket
from orchestrator.storage.peer import Peer
from orchestrator.storage.port import Gone
from tests.support.tier_servers import RUN, SECRET, Host, answer, fake, host, in_thread

ATTEMPT = AttemptId.of(20, 2, 1)
FILE = ATTEMPT.key("state/d/0")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    folder = tmp_path_factory.mktemp("hosts")
    with host(folder / "a") as a, host(folder / "b") as b:
        yield a, b


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A file's key that no other test uses."""
    return ATTEMPT.key(f"state/{request.node.name[:60]}")


def test_a_file_is_read_into_a_buffer_from_any_place_as_preadv_does(hosts: tuple[Host, Host], key: str) -> None:
    body = os.urandom((3 << 20) + 7)
    hosts[0].put(1, key, body)
    part = hosts[0].peer.part(1)
    for offset, size in (
        (0, len(body)),
        (5, 1 << 20),
        (len(body) - 3, 10),
        (len(body), 10),
        (len(body) + 9, 1),
        (7, 0),
    ):
        buffer = bytearray(size)
        got = part.read_into(key, offset, memoryview(buffer))
        assert bytes(buffer[:got]) == body[offset : offset + size]
    assert part.size(key) == len(body) and part.size(key + "x") is None
    with pytest.raises(Gone, match=r"http://127.*process-00001/steps/.*there is no such file"):
        part.read_into(key + "x", 0, memoryview(bytearray(1)))


def test_parts_are_listed_by_process_and_attempt(tmp_path: Path) -> None:
    with in_thread(tmp_path / "c") as one:
        assert one.peer.parts() == {}
        one.put(3, FILE, b"x")
        one.put(3, AttemptId.of(10, 1, 2).key("a"), b"x")
        one.part(11)
        assert one.peer.parts() == {3: [AttemptId.of(10, 1, 2), ATTEMPT], 11: []}


def test_files_are_sent_to_another_server_whole_and_sending_again_is_fine(hosts: tuple[Host, Host], key: str) -> None:
    a, b = hosts
    bodies = {f"{key}/{number}": os.urandom(size) for number, size in enumerate((0, 5, 2 << 20))}
    for name, body in bodies.items():
        a.put(2, name, body)
    for _ in range(2):
        a.peer.send(2, list(bodies), [b.address])
        for name, body in bodies.items():
            assert b.peer.part(2).get(name) == body
            assert (b.base / RUN / "process-00002" / name).stat().st_nlink == 1
    found = b.peer.part(2).measure(f"{key}/2")
    assert found and found.crc32c == crc32c(bodies[f"{key}/2"])


def test_many_threads_read_and_send_at_once_and_each_has_its_own(hosts: tuple[Host, Host], key: str) -> None:
    a, b = hosts
    bodies = {f"{key}/{number}": os.urandom(700_000) for number in range(3)}
    for name, body in bodies.items():
        a.put(7, name, body)

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(30):
            name, offset = chance.choice(list(bodies)), chance.randrange(700_000)
            view = memoryview(bytearray(chance.choice((10, 5_000, 400_000))))
            got = a.peer.part(7).read_into(name, offset, view)
            assert view[:got] == bodies[name][offset : offset + len(view)]

    def send(_: int) -> None:
        a.peer.send(7, list(bodies), [b.address])

    with ThreadPoolExecutor(10) as pool:
        for done in [*(pool.submit(read, seed) for seed in range(6)), *(pool.submit(send, each) for each in range(4))]:
            done.result(60)
    assert {name: b.peer.part(7).get(name) for name in bodies} == bodies
    assert not list(b.part(7).glob(".tmp/*"))


def test_what_cannot_be_sent_says_whom_what_and_why(hosts: tuple[Host, Host], key: str) -> None:
    a, b = hosts
    a.put(4, key, b"this")
    b.put(4, key, b"that")
    for keys, to, text in (
        ([key], [b.address], rf"copy {RUN}/process-00004/{key} to {b.address}: .*another body"),
        ([key + "-gone"], [b.address], "no such file"),
        ([key], ["127.0.0.1:1"], "no tier server at 127.0.0.1:1"),
        ([key], ["nowhere"], "'nowhere' is no address"),
    ):
        with pytest.raises(StorageError, match=text):
            a.peer.send(4, keys, to)
    assert b.peer.part(4).get(key) == b"that"


def test_a_copy_of_an_older_epoch_is_rejected_once_a_newer_one_was_announced(tmp_path: Path) -> None:
    with in_thread(tmp_path / "a") as a, in_thread(tmp_path / "b") as b:
        for name in ("0", "1"):
            a.put(0, ATTEMPT.key(name), b"x")
        a.peer.send(0, [ATTEMPT.key("0")], [b.address])
        b.peer.announce(ATTEMPT.epoch)
        a.peer.send(0, [ATTEMPT.key("0")], [b.address])
        b.peer.announce(ATTEMPT.epoch + 1)
        b.peer.announce(ATTEMPT.epoch)
        with pytest.raises(StorageError, match=r"fenced by epoch 3"):
            a.peer.send(0, [ATTEMPT.key("1")], [b.address])
        assert b.peer.part(0).size(ATTEMPT.key("1")) is None


def test_another_secret_reads_nothing_and_is_told_so(hosts: tuple[Host, Host], key: str) -> None:
    hosts[0].put(5, key, b"secret state")
    stranger = Peer(hosts[0].address, bytes(32), RUN)
    with pytest.raises(Unavailable, match=rf"the secrets differ: the tier server at {hosts[0].address}"):
        stranger.part(5).get(key)
    assert SECRET.hex() not in repr(hosts[0].peer) + repr(hosts[0].peer.part(5)) + str(vars(hosts[0].peer))


# Whoever answers there is not what one hopes for.

SIZE = 30_000


def cuts_short(raw: socket.socket, request: bytes) -> bool:
    raw.sendall(answer(request, 206, SIZE) + bytes(1000))
    return False


def resets(raw: socket.socket, request: bytes) -> bool:
    raw.sendall(answer(request, 206, SIZE) + bytes(1000))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def says_nothing(raw: socket.socket, request: bytes) -> bool:
    while raw.fileno() >= 0:  # until the test is over
        time.sleep(0.02)
    return False


def stalls(raw: socket.socket, request: bytes) -> bool:
    raw.sendall(answer(request, 206, SIZE) + bytes(1000))
    return says_nothing(raw, request)


def trickles(raw: socket.socket, request: bytes) -> bool:
    raw.sendall(answer(request, 206, SIZE))
    for _ in range(10_000):
        raw.sendall(b"x")
        time.sleep(0.02)
    return False


def trickles_its_header(raw: socket.socket, request: bytes) -> bool:
    for byte in b"HTTP/1.1 200 " + b"O" * 10_000:
        raw.sendall(bytes([byte]))
        time.sleep(0.02)
    return False


def sends(text: Callable[[bytes], bytes]) -> Callable[[socket.socket, bytes], bool]:
    def behave(raw: socket.socket, request: bytes) -> bool:
        raw.sendall(text(request))
        return False

    return behave


@pytest.mark.parametrize(
    ("behave", "text"),
    [
        (cuts_short, r"ends after 1000 of 30000 bytes|broke: "),
        (resets, "the connection to .* broke: |ends after"),
        (says_nothing, r"no byte for 0.3 s: the host is slow, gone, or cut off"),
        (stalls, r"no byte for 0.3 s"),
        (trickles, "it goes on, but too slowly to be of use"),
        (trickles_its_header, "it goes on, but too slowly to be of use"),
        (sends(lambda request: b""), "the connection to .* broke: "),
        (sends(lambda request: b"SSH-2.0-OpenSSH_9.6\r\n" * 10), "the connection to .* broke: "),
        (sends(lambda request: b"\x16\x03\x01" * 100), "the connection to .* broke: "),
        (sends(lambda request: b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 200_000), "broke: "),
        (sends(lambda request: b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n"), "broke: "),
        (sends(lambda request: b"HTTP/1.1 206 X\r\nContent-Length: 9\r\n\r\n123456789"), "no tier server of this job"),
        (sends(lambda request: b"HTTP/1.1 302 X\r\nLocation: http://a/\r\nContent-Length: 0\r\n\r\n"), "HTTP 302"),
        (sends(lambda request: b"HTTP/1.1 403 X\r\nContent-Length: 0\r\n\r\n"), "the secrets differ: "),
        (sends(lambda request: answer(request, 206, 9, bytes(32)) + bytes(9)), "does not know the job's secret"),
        (sends(lambda request: answer(request, 206, 9).replace(b": 9\r", b": 8\r") + bytes(9)), "does not know"),
        (sends(lambda request: answer(request, 206, 9).replace(b" 206 ", b" 200 ") + bytes(9)), "does not know"),
        (sends(lambda request: answer(request, 200, SIZE) + bytes(SIZE)), "HTTP 200"),
        (sends(lambda request: answer(request, 206, SIZE + 1) + bytes(SIZE + 1)), "30001 bytes to a request for 30000"),
        (sends(lambda request: answer(request, 500, 4) + b"what"), "HTTP 500"),
        (sends(lambda request: answer(request, 500, 1 << 40) + b"what"), "at most 67108864"),
    ],
)  # fmt: skip
def test_whatever_answers_wrongly_is_one_bounded_error_that_names_it(
    behave: Callable[[socket.socket, bytes], bool], text: str
) -> None:
    with fake(behave) as there:
        part = Peer(there.address, SECRET, RUN, deadline_s=0.3).part(1)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=text) as caught:
            part.read_into(FILE, 0, memoryview(bytearray(SIZE)))
        assert time.monotonic() - began < 15
        assert there.address in str(caught.value) and FILE in str(caught.value)
        assert SECRET.hex() not in str(caught.value)
        assert len(there.requests) == 1  # it was no kept connection: it is not asked again


def test_a_peer_that_stalls_is_given_up_long_before_all_of_its_answer_would_be_late() -> None:
    def behave(raw: socket.socket, request: bytes) -> bool:
        raw.sendall(answer(request, 206, 16 << 20) + bytes(1000))
        return says_nothing(raw, request)

    with fake(behave) as there:
        part = Peer(there.address, SECRET, RUN, deadline_s=0.3).part(1)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"no byte for 0\.3 s"):
            part.read_into(FILE, 0, memoryview(bytearray(16 << 20)))
        assert time.monotonic() - began < 60  # 256 s are allowed for 16 MiB


def test_a_peer_that_moves_slowly_is_waited_for_longer_than_it_may_say_nothing() -> None:
    size = 1_000_000

    def slow(raw: socket.socket, request: bytes) -> bool:
        raw.sendall(answer(request, 206, size))
        for _ in range(20):
            time.sleep(0.1)
            raw.sendall(bytes(size // 20))
        return True

    with fake(slow) as there:
        part = Peer(there.address, SECRET, RUN, deadline_s=0.9).part(1)
        assert part.read_into(FILE, 0, memoryview(bytearray(size))) == size


def test_a_kept_connection_that_was_closed_meanwhile_is_replaced_once() -> None:
    closing = threading.Event()

    def behave(raw: socket.socket, request: bytes) -> bool:
        if closing.is_set():
            return False
        raw.sendall(answer(request, 206, 4) + b"body")
        return True

    with fake(behave) as there:
        part = Peer(there.address, SECRET, RUN, deadline_s=5).part(1)
        view = memoryview(bytearray(4))
        assert part.read_into(FILE, 0, view) == part.read_into(FILE, 0, view) == 4
        assert len(there._open) == 1  # one connection for both
        closing.set()
        with pytest.raises(Unavailable, match="broke"):
            part.read_into(FILE, 0, view)
        assert len(there.requests) == 4  # on the kept one, and on a new one; and that is all
        closing.clear()
        assert part.read_into(FILE, 0, view) == 4
        there._open[-1].shutdown(socket.SHUT_RDWR)  # while nobody uses it
        assert part.read_into(FILE, 0, view) == 4


def test_an_answer_that_another_request_has_had_is_not_believed() -> None:
    replayed: list[bytes] = []

    def behave(raw: socket.socket, request: bytes) -> bool:
        replayed.append(answer(request, 206, 4))
        raw.sendall(replayed[0] + b"body")
        return False

    with fake(behave) as there:
        part = Peer(there.address, SECRET, RUN, deadline_s=5).part(1)
        assert part.read_into(FILE, 0, memoryview(bytearray(4))) == 4
        with pytest.raises(Unavailable, match="does not know the job's secret"):
            part.read_into(FILE, 0, memoryview(bytearray(4)))


@pytest.mark.parametrize(
    ("behave", "text"),
    [
        (sends(lambda request: b""), "broke|ended before all was sent"),
        (says_nothing, "no byte for|it has taken no byte for"),
        (sends(lambda request: answer(request, 409, 38) + b'{"kind":"conflict","text":"not taken"}'), "not taken"),
        (sends(lambda request: b"HTTP/1.1 403 X\r\nContent-Length: 0\r\n\r\n"), "the secrets differ"),
    ],
)
def test_what_is_sent_to_a_server_that_misbehaves_is_an_error_that_names_it(
    behave: Callable[[socket.socket, bytes], bool], text: str, tmp_path: Path
) -> None:
    """Also while it has taken a part of the body only: 4 MiB do not fit into the buffers of a connection."""
    with fake(behave) as there, in_thread(tmp_path / "a", stall_s=1.0) as own:
        own.put(1, FILE, bytes(32 << 20))
        with pytest.raises(StorageError, match=text) as caught:
            own.peer.send(1, [FILE], [there.address])
        assert there.address in str(caught.value) and FILE in str(caught.value)


def test_a_limit_below_the_slowest_rate_is_kept_and_is_no_stall(tmp_path: Path) -> None:
    with in_thread(tmp_path / "a") as a, in_thread(tmp_path / "b", stall_s=1.0) as b:
        a.put(1, FILE, bytes(80_000))
        a.peer.send(1, [FILE], [b.address], bytes_per_s=30_000)  # at 64 KiB/s it would be late after 2.2 s
        assert b.peer.part(1).size(FILE) == 80_000


def test_copies_take_no_more_of_the_network_than_they_may(hosts: tuple[Host, Host], key: str) -> None:
    a, b = hosts
    a.put(6, key, bytes(2 << 20))
    began = time.monotonic()
    a.peer.send(6, [key], [b.address], bytes_per_s=4 << 20)
    assert time.monotonic() - began > 0.35  # half a second, less what may be sent at once
    assert b.peer.part(6).size(key) == 2 << 20


def test_a_bucket_gives_its_rate_and_no_more_after_a_pause() -> None:
    now = [0.0]
    bucket = TokenBucket(1000, lambda: now[0])
    waits = [bucket.take(100) for _ in range(5)]
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    now[0] = 100.0
    assert bucket.take(100) == 0 and bucket.take(100) == pytest.approx(0.05)  # 50 bytes may be sent at once


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("10.0.0.3:80", ("10.0.0.3", 80)),
        ("[::1]:8476", ("::1", 8476)),
        ("host-b.svc:1", ("host-b.svc", 1)),
        *((bad, None) for bad in ("", "host", "host:", ":80", "::1:80", "host:70000", "a b:1", "[]:1", "a/b:1")),
    ],
)  # fmt: skip
def test_an_address_is_a_host_and_a_port(address: str, parsed: tuple[str, int] | None) -> None:
    if parsed is None:
        with pytest.raises(UsageError, match="expected host:port"):
            Peer(address, SECRET, RUN)
    else:
        assert peer_protocol.parse_address(address, "x") == parsed and peer_protocol.show_address(*parsed) == address

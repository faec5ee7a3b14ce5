"""Another host's tier as a store: the client, against a tier server that is a program of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import crc32c
from orchestrator.storage.peer import Peer
from orchestrator.storage.port import Gone
from tests.support.tier_servers import RUN, SECRET, Host, host

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
    with host(tmp_path / "c") as one:
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
    with host(tmp_path / "a") as a, host(tmp_path / "b") as b:
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

"""The tier server: what it does with requests that are not what it hopes for, and with the files of this machine; and
as a program: how it starts and ends, and who may know its secret."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path

import pytest

from orchestrator import environment
from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.peer_protocol import CLOCK_S, Request, Target
from orchestrator.rules.records import crc32c
from orchestrator.run import tier_directory, tier_process, tier_server
from orchestrator.run.tier import OwnTier
from orchestrator.run.tier_room import Room
from orchestrator.run.tier_shelf import Copy, Rejected, Shelf
from orchestrator.storage.peer import Peer
from tests.support.snapshots import snapshot
from tests.support.tier_servers import RUN, SECRET, Host, InThread, ask, header, host, in_thread, status

ATTEMPT = AttemptId.of(20, 2, 1)
FILE = ATTEMPT.key("state/d/0")
BODY = b"the state of a job" * 100
BIG = os.urandom(1 << 20)  # too large to be read at once
OURS = os.getuid()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host") / "a") as running:
        running.put(1, FILE, BODY)
        yield running


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """A server that waits for 0.8 s only."""
    with in_thread(tmp_path_factory.mktemp("host") / "b", stall_s=0.8, idle_s=0.8) as running:
        yield running


def target(key: str = FILE, process: int = 1, **query: str) -> str:
    return Target(RUN, process, key, query).encode()


def put(key: str, body: bytes, process: int = 1, **more: object) -> Request:
    return Request("PUT", target(key, process), "", len(body), crc32c(body))


# Strangers.


@pytest.mark.parametrize(
    "request_",
    [
        Request("GET", target()),
        Request("GET", target(), "bytes=0-4"),
        Request("HEAD", target()),
        Request("GET", target(measure="")),
        Request("GET", Target(RUN).encode()),
        Request("GET", target("", list="", start="")),
        Request("GET", "/"),
        Request("PUT", target(ATTEMPT.key("new")), "", 5, crc32c(b"12345")),
        Request("PUT", f"/{RUN}?epoch=9"),
        Request("POST", target(""), "", 2, crc32c(b"{}")),
        Request("DELETE", target()),
    ],
    ids=lambda request: f"{request.method} {request.target[:60]}",
)
def test_another_jobs_secret_or_none_neither_reads_nor_feeds(one: Host, request_: Request) -> None:
    before = snapshot(one.base)
    body = b"12345"[: request_.body_bytes]
    for head in (
        header(request_, secret=bytes(32)),
        header(request_).replace(b"Authorization", b"X-Other"),
        header(request_).replace(f"{request_.method} ".encode(), b"OPTIONS "),
        header(request_).replace(b" /", b" /0", 1),
    ):
        answer = ask(one.address, head + body)
        assert status(answer) in (403, 400), answer
        assert BODY[:18] not in answer and b"Tier-Proof" not in answer
    assert snapshot(one.base) == before
    assert status(ask(one.address, header(Request("GET", target())))) == 200


def test_a_clock_that_is_off_is_named_to_whoever_knows_the_secret(one: Host) -> None:
    answer = ask(one.address, header(Request("GET", target()), at_s=time.time() - CLOCK_S - 60))
    assert status(answer) == 403 and b"away from this host's clock" in answer and b"NTP" in answer


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\r\n\r\n",
        b"GET",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 100_000 + b"\r\n",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_a_broken_or_endless_header_ends_its_connection_and_nothing_else(one: Host, text: bytes) -> None:
    assert status(ask(one.address, text, close=True)) in (0, 400, 403)
    assert one.peer.part(1).get(FILE) == BODY


def test_who_sends_nothing_or_a_byte_at_a_time_is_cut_off_and_others_go_on(short: InThread) -> None:
    began = time.monotonic()
    head = header(Request("GET", target()))
    with socket.create_connection(("127.0.0.1", short.port), 10) as silent:
        with socket.create_connection(("127.0.0.1", short.port), 10) as slow:
            slow.settimeout(0.05)
            cut = False
            for byte in head[:-2]:
                try:
                    slow.sendall(bytes([byte]))
                    cut = slow.recv(1) == b""
                except TimeoutError:
                    continue
                except ConnectionError:
                    cut = True
                if cut:
                    break
        assert cut
        assert silent.recv(1) == b""
    assert time.monotonic() - began < 10
    assert status(ask(short.address, header(Request("GET", Target(RUN).encode())))) in (200, 404)


def test_a_connection_that_is_used_is_kept_for_longer_than_an_idle_one(short: InThread) -> None:
    short.put(1, FILE, BODY)
    head = header(Request("GET", target(), "bytes=0-4")).replace(b"close", b"keep-alive")
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", short.port), 10) as raw:
        while time.monotonic() - began < 2:  # an idle one has 0.8 s
            raw.sendall(head)
            answer = raw.recv(1 << 16)
            assert status(answer) == 206, answer
            time.sleep(0.05)
        raw.settimeout(10)
        assert raw.recv(1) == b""  # and when it is not used any more, it is ended


def test_a_connection_too_many_is_closed_at_once_and_later_ones_are_served(tmp_path: Path) -> None:
    with in_thread(tmp_path / "c", idle_s=30, connections_max=3) as few:
        opened = [socket.create_connection(("127.0.0.1", few.port), 10) for _ in range(3)]
        deadline = time.monotonic() + 10
        head = header(Request("GET", Target(RUN).encode()))
        while ask(few.address, head, deadline_s=5) and time.monotonic() < deadline:
            time.sleep(0.01)  # until the three are known
        assert ask(few.address, head) == b""
        for each in opened:
            each.close()
        while not (got := ask(few.address, header(Request("GET", Target(RUN).encode())))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert status(got) == 404


# What is asked for.


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (Target("f" * 16).encode(), 404),  # another run
        (Target("f" * 16, 1, FILE).encode(), 404),
        (target(process=9), 404),
        (target(ATTEMPT.key("none")), 404),
        (target(ATTEMPT.key("state")), 500),  # a directory
        (target(FILE + "/x"), 404),  # below a file
        (f"/{RUN}/process-00001/../process-00001/{FILE}", 400),
        (f"/{RUN}/process-00001/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", 400),
        (f"/{RUN}/process-00001//etc/passwd", 400),
        (f"/{RUN}/process-00001/a%00b", 400),
        (f"/{RUN}/process-00001/" + "a" * 3000, 500),
        (f"/{RUN}/process-00001/" + "a" * 5000, 400),
        (f"/{RUN}/process-00001/.tmp/x", 400),
        ("/etc/passwd", 400),
        (target("link"), 500),
        (target("linked/0"), 500),
        (target("pipe"), 500),
        (target("socket"), 500),
        (target("foreign"), 500 if OURS == 0 else 200),
        (target("", process=2), 400),  # nothing that is done to a part
        (target("", 2, list="", start=""), 500),  # a link in the place of a part
        (target("x", 2), 500),
        (target("x", 3), 500),  # a part that others may enter
        (target("x", 4), 500 if OURS == 0 else 200),  # one that somebody else owns
    ],
)
def test_nothing_but_our_own_files_in_their_places_is_given_away(one: Host, asked: str, code: int) -> None:
    part = one.part(1)
    with_links = {"link": "/etc/passwd", "linked": "/etc"}
    for name, where in with_links.items():
        if not (part / name).is_symlink():
            (part / name).symlink_to(where)
    if not (part / "pipe").exists():
        os.mkfifo(part / "pipe")
        with chdir(part), socket.socket(socket.AF_UNIX) as left:  # a socket's path is short
            left.bind("socket")
        one.put(1, "foreign", b"x")
        if OURS == 0:
            os.chown(part / "foreign", 4321, -1)
        (one.base / RUN / "process-00002").symlink_to("/etc")
        one.put(3, "x", b"x")
        (one.part(3)).chmod(0o755)
        one.put(4, "x", b"x")
        if OURS == 0:
            os.chown(one.part(4), 4321, -1)
    answer = ask(one.address, header(Request("GET", asked)))
    assert status(answer) == code, answer
    assert b"root:" not in answer


@pytest.mark.parametrize("asked", ["bytes=5-", "bytes=-5", "bytes=0-1,4-5", "bytes=9999999-99999999", "lines=1-2"])
def test_a_range_that_is_none_is_not_answered_with_something_else(one: Host, asked: str) -> None:
    assert status(ask(one.address, header(Request("GET", target(), asked)))) == 416


def test_several_requests_go_over_one_connection_and_none_changes_another(one: Host) -> None:
    heads = [header(Request("GET", target(), f"bytes={first}-{first + 3}")) for first in range(50)]
    kept = [head.replace(b"close", b"keep-alive") for head in heads[:-1]]
    answer = ask(one.address, b"".join(kept), heads[-1])
    bodies = [part.partition(b"\r\n\r\n")[2][:4] for part in answer.split(b"HTTP/1.1 206 ")[1:]]
    assert bodies == [BODY[first : first + 4] for first in range(50)]


# Copies.


def _declared(body: bytes, size: int | None) -> bytes:
    """A request whose signature is of a body without what is odd in `body`."""
    signed = body.removesuffix(b"?")
    line = b"" if size is None else f"Content-Length: {size}\r\n".encode()
    head = header(put(ATTEMPT.key("k"), signed))
    return head.replace(f"Content-Length: {len(signed)}\r\n".encode(), line) + (body[:size] if size else body)


TAKEN: dict[str, tuple[Callable[[], bytes], int]] = {
    "shorter than declared": (lambda: header(put(ATTEMPT.key("k"), BIG)) + BIG[:-1], 422),
    "shorter, of a small file": (lambda: header(put(ATTEMPT.key("k"), BODY)) + BODY[:-1], 422),
    "no body": (lambda: header(put(ATTEMPT.key("k"), BIG)), 422),
    "other bytes": (lambda: header(put(ATTEMPT.key("k"), BIG)) + BIG[:-1] + b"?", 422),
    "other bytes, of a small file": (lambda: header(put(ATTEMPT.key("k"), BODY)) + BODY[:-1] + b"?", 422),
    "less than signed": (lambda: _declared(BODY, 1799), 400),
    "more than signed": (lambda: _declared(BODY + b"?", 1801), 400),
    "more than signed, large": (lambda: _declared(BIG + b"?", (1 << 20) + 1), 400),
    "no length": (lambda: _declared(BODY, None), 400),
    "in chunks": (
        lambda: header(put(ATTEMPT.key("k"), b""), Transfer_Encoding="chunked") + b"1\r\nx\r\n0\r\n\r\n",
        400,
    ),
    "no file of an attempt": (lambda: header(put("journal/0", BODY)) + BODY, 400),
    "no file of an attempt, large": (lambda: header(put("steps/x", BIG)) + BIG, 400),
    "an attempt's name in another spelling": (lambda: header(put("steps/020/e0002-a01/k", BODY)) + BODY, 400),
    "of an older epoch": (lambda: header(put(AttemptId.of(20, 1, 1).key("k"), BODY)) + BODY, 409),
    "of an older epoch, large": (lambda: header(put(AttemptId.of(20, 1, 1).key("k"), BIG)) + BIG, 409),
    "more than there is room for": (
        lambda: header(Request("PUT", target(ATTEMPT.key("k")), "", 1 << 50, "00000000")) + BIG[:100],
        507,
    ),
    "a name that is too long": (lambda: header(put(ATTEMPT.key("k" * 300), BODY)) + BODY, 500),
    "below a file": (lambda: header(put(FILE + "/k", BODY)) + BODY, 500),
    "of another body": (lambda: header(put(FILE, BODY[1:])) + BODY[1:], 409),
    "of another body, large": (lambda: header(put(FILE, BIG)) + BIG, 409),
    "for a part that is a link": (lambda: header(put(ATTEMPT.key("k"), BODY, 2)) + BODY, 500),
}


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with host(tmp_path_factory.mktemp("host") / "d") as running:
        running.put(1, FILE, BODY)
        (running.base / RUN / "process-00002").symlink_to(tmp_path_factory.mktemp("elsewhere"))
        running.peer.announce(2)
        Room(str(running.base / RUN)).look()  # its lock stays
        yield running


@pytest.mark.parametrize("name", TAKEN)
def test_a_copy_that_is_not_what_was_announced_leaves_nothing_and_the_sender_is_told(taking: Host, name: str) -> None:
    sent, code = TAKEN[name]

    def there() -> dict[str, str]:
        for _ in range(1000):
            with suppress(FileNotFoundError):  # of what is being freed
                return {path: body for path, body in snapshot(taking.base).items() if not path.endswith(".tmp")}
        raise AssertionError("it is never quiet")

    before = there()
    answer = ask(taking.address, sent(), close=code == 422)
    assert status(answer) == code or (code == 422 and not answer), answer
    assert b"Tier-Proof" not in answer or b'"text":"' in answer
    deadline = time.monotonic() + 10
    while there() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # whoever has closed its connection is not waited for
    assert there() == before
    assert taking.peer.part(1).get(FILE) == BODY


def test_a_sender_that_is_rejected_early_can_still_read_why(taking: Host) -> None:
    with socket.create_connection(("127.0.0.1", int(taking.address.rpartition(":")[2])), 10) as raw:
        raw.sendall(header(put(FILE, BIG)) + BIG[:1000])
        assert status(raw.recv(1 << 16, socket.MSG_PEEK)) == 409
        for _ in range(3):  # it has not looked yet
            raw.sendall(bytes(100_000))
            time.sleep(0.05)
        assert b"another body is not taken" in raw.recv(1 << 16)


@pytest.mark.parametrize("body", [BODY, BIG], ids=["small", "large"])
def test_a_sender_that_stalls_is_cut_off_and_nothing_of_it_stays(short: InThread, body: bytes) -> None:
    began = time.monotonic()
    answer = ask(short.address, header(put(ATTEMPT.key("stalled"), body)) + body[:-1], close=False)
    assert status(answer) == 422 and b"no byte came for 0.8 s" in answer
    assert time.monotonic() - began < 10
    assert not list(short.base.glob(f"{RUN}/*/.tmp/*")) and not list(short.base.glob(f"{RUN}/*/steps/*/*/stalled"))


def test_a_sender_that_is_slow_but_moves_is_not_cut_off(short: InThread) -> None:
    pieces = [BIG[first : first + (64 << 10)] for first in range(0, len(BIG), 64 << 10)]
    with socket.create_connection(("127.0.0.1", short.port), 10) as raw:
        raw.sendall(header(put(ATTEMPT.key("slow"), BIG)))
        for piece in pieces:
            time.sleep(0.1)  # 1.6 s for all of it
            raw.sendall(piece)
        assert status(raw.recv(1 << 16)) == 200
    assert (short.base / RUN / "process-00001" / ATTEMPT.key("slow")).read_bytes() == BIG


def test_a_reader_that_takes_nothing_is_cut_off(short: InThread) -> None:
    with (short.part(5) / "huge").open("wb") as file:
        file.truncate(256 << 20)
    with socket.create_connection(("127.0.0.1", short.port), 10) as raw:
        raw.sendall(header(Request("GET", target("huge", 5))))
        time.sleep(2)
        got = 0
        with suppress(ConnectionError):
            while more := raw.recv(1 << 20):
                got += len(more)
                last = more[-200:]
    assert got < 256 << 20 and not any(last)  # nothing else follows, such as an answer to a request that has failed


def test_the_paths_of_agents_and_of_their_server_are_the_same(one: Host) -> None:
    path = Path(tier_directory.of_process(str(one.base.parent), RUN, 1))
    assert (path / FILE).read_bytes() == BODY == one.peer.part(1).get(FILE)


def test_copies_of_an_epoch_older_than_the_newest_log_here_are_rejected(one: Host) -> None:
    tier = OwnTier(str(one.base / ("e" * 16) / "process-00000"), "test")
    tier.open_epoch(3, 7)
    for epoch, code in ((2, 409), (3, 200), (4, 200)):
        request = Request("PUT", Target("e" * 16, 8, AttemptId.of(20, epoch, 1).key("k")).encode(), "", 1, crc32c(b"x"))
        answer = ask(one.address, header(request) + b"x")
        assert status(answer) == code, answer
        assert (b"fenced by epoch 3" in answer) == (code == 409)


def test_an_announced_epoch_is_known_to_the_next_server_here(tmp_path: Path) -> None:
    for epoch in (4, 5):
        with in_thread(tmp_path / "e") as running:
            running.peer.announce(epoch)
    with in_thread(tmp_path / "e") as running:
        answer = ask(running.address, header(put(AttemptId.of(20, 4, 1).key("k"), BODY)) + BODY)
        assert status(answer) == 409 and b"fenced by epoch 5" in answer
        assert [path.name for path in (running.base / RUN).iterdir()] == ["epoch-0005"]


def test_a_copy_that_gets_its_name_just_after_a_newer_epoch_was_announced_does_not_stay(tmp_path: Path) -> None:
    class Raced(Shelf):
        looks = 0

        def _check_epoch(self, run: str, attempt: AttemptId) -> None:
            super()._check_epoch(run, attempt)
            self.looks += 1
            if self.looks == 2:  # all bytes are in, and were looked at; what follows is the name
                self.announce(run, attempt.epoch + 1)

    shelf = Raced(str(tmp_path / f"orchestrator-{OURS}"))
    shelf.prepare()
    with pytest.raises(Rejected, match="fenced by epoch 3"):
        shelf.take(Copy(Target(RUN, 1, FILE), len(BODY), crc32c(BODY)), iter([BODY]))
    assert not list(Path(shelf.base).rglob("state/d/0"))


def test_copies_take_no_more_than_their_host_may_hold(tmp_path: Path) -> None:
    with in_thread(tmp_path / "f") as running:
        Room(str(running.base / RUN)).record(3000)
        for name, code in (("a", 200), ("b", 507), ("a", 200)):  # again: it is there, and needs nothing
            answer = ask(running.address, header(put(ATTEMPT.key(name), BODY)) + BODY)
            assert status(answer) == code
            assert (
                b"needs 1800 bytes, and there are 1200 of the 3000 of bytes_max beside the 1800 used" in answer
            ) == (code == 507)


def test_what_a_killed_server_left_of_copies_is_freed_and_what_others_write_stays(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path / f"orchestrator-{OURS}"))
    shelf.prepare()
    kept = []
    for process, names in ((1, ("old", "new")), (2, ("old",))):  # process 2 is of this host: it has a log
        temporaries = Path(shelf.base) / RUN / f"process-0000{process}" / ".tmp"
        temporaries.mkdir(parents=True)
        for each in (temporaries.parent.parent, temporaries.parent):
            each.chmod(0o700)
        for name in names:
            (temporaries / name).write_bytes(b"half of a copy")
        os.utime(temporaries / "old", (0, time.time() - 200))
        kept += [temporaries / name for name in names if (process, name) != (1, "old")]
    (kept[-1].parent.parent / "journal").mkdir()
    (Path(shelf.base) / "somebody's").touch()
    shelf.sweep()
    assert sorted(Path(shelf.base).glob("*/*/.tmp/*")) == sorted(kept)


def test_one_run_may_be_served_alone(tmp_path: Path) -> None:
    with in_thread(tmp_path / "h", run=RUN) as running:
        for run in (RUN, "f" * 16):
            (running.part(1, run) / "x").write_bytes(b"x")
        assert running.peer.part(1).get("x") == b"x"
        other = Peer(running.address, SECRET, "f" * 16)
        assert other.part(1).get("x") is None and other.parts() == {}
        with pytest.raises(Unavailable, match="another run"):
            other.announce(3)


# As a program.


def test_a_server_takes_a_socket_that_was_bound_before_so_that_its_address_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing of ours can be imported from
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        for _ in range(2):
            with host(tmp_path / "a", sock=bound) as running:
                environ = Path(f"/proc/{running.server.pid}/environ").read_bytes().split(b"\0")
                assert f"PYTHONPATH={Path(__file__).parents[2]}".encode() in environ
                assert running.address == f"127.0.0.1:{bound.getsockname()[1]}"
                assert running.peer.parts() == {}


def test_the_server_imports_nothing_that_is_heavy() -> None:
    script = (
        "import sys, orchestrator.run.tier_server\n"
        "heavy = {'jax', 'jaxlib', 'numpy', 'orbax', 'tensorstore', 'gcsfs', 'fsspec', 'google', 'rich', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--directory={base} --listen={used}", "listen at {used}: Address already in use; choose another one"),
        ("--directory={base} --listen=192.0.2.7:0", "listen at 192.0.2.7:0: Cannot assign requested address"),
        ("--directory={base} --listen=nonsense", "--listen: 'nonsense' is no address"),
        ("--directory={base} --listen=fd:999", "--listen=fd:999: is no bound socket of this process"),
        ("--directory={folder}", "expected a directory of the name orchestrator-"),
        ("--directory={folder}/gone/{name}", "ENOENT"),
        ("--directory={folder}/open/{name}", "may be entered by others"),
        ("--directory={folder}/linked/{name}/../{name}", "may be entered by others"),
    ],
)
def test_what_keeps_a_server_from_listening_is_one_clear_error(
    tmp_path: Path,
    one: Host,
    arguments: str,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"orchestrator-{OURS}"
    (tmp_path / "open" / name).mkdir(parents=True, mode=0o755)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / name).symlink_to(tmp_path / "open" / name)
    places = {"base": tmp_path / name, "folder": tmp_path, "name": name, "used": one.address}
    monkeypatch.setenv(environment.TIER_SECRET, SECRET.hex())
    assert tier_server.main(arguments.format(**places).split()) != 0
    assert text.format(**places) in json.loads(capsys.readouterr().out)["error"]


def test_whoever_starts_a_server_that_does_not_listen_is_told_why(tmp_path: Path) -> None:
    base = str(tmp_path / f"orchestrator-{OURS}")
    with pytest.raises(StorageError, match=r"first line of standard input: expected .* hexadecimal digits"):
        tier_process.start(base, bytes(3))


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("exec sleep 60", "did not listen at 127.0.0.1:0 within 0.5 s"),
        ("echo nonsense; exec sleep 60", "did not listen at 127.0.0.1:0 within 0.5 s"),
        ("exit 7", "ended with code 7 before it listened at 127.0.0.1:0; its log says why"),
    ],
)
def test_a_server_that_does_not_start_is_given_up_in_time_and_is_gone(
    tmp_path: Path, program: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(StorageError, match=text):
        tier_process.start(str(tmp_path), SECRET, timeout_s=0.5 if "sleep" in program else 20)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_the_secret_is_nowhere_that_others_look(tmp_path: Path) -> None:
    """Neither in `ps` nor in the log, also of a server that takes it from the environment; nor does a child get it."""
    base = tmp_path / f"orchestrator-{OURS}"
    log = tmp_path / "log"
    command = [sys.executable, "-m", "orchestrator.run.tier_server", f"--directory={base}", "--detached"]
    environ = {**os.environ, environment.TIER_SECRET: SECRET.hex()}
    with log.open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, env=environ)
    assert server.stdout
    try:
        told = server.stdout.readline()
        address = json.loads(told)["address"]
        assert Peer(address, SECRET, RUN).parts() == {}
        with pytest.raises(Unavailable):
            Peer(address, bytes(32), RUN).parts()
        ask(address, header(Request("GET", target())) * 3, b"garbage\r\n\r\n")
        shown = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait(20)
        server.stdout.close()
    text = log.read_text()
    assert "rejected: another secret has signed it" in text and "SIGTERM" in text and "Traceback" not in text
    for found in (shown.decode(), told.decode(), text):
        assert SECRET.hex() not in found and repr(SECRET) not in found


PARENT = """
import os, signal, sys, time
from orchestrator.run import tier_process
server = tier_process.start(sys.argv[1], bytes(range(32)))
if os.fork() == 0:  # as a data loader's worker: it holds the pipe to the server, and outlives its parent
    time.sleep(60)
    os._exit(0)
print(server.pid, server.address, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_the_process_that_started_it_however_that_dies(tmp_path: Path, how: signal.Signals) -> None:
    base = str(tmp_path / f"orchestrator-{OURS}")
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), base], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout
    try:
        pid, address = parent.stdout.readline().split()
        assert Peer(address, SECRET, RUN).parts() == {}
        parent.send_signal(how)
        parent.wait(20)
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the server outlives its parent"
            time.sleep(0.05)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait(20)
        parent.stdout.close()


def test_a_server_that_is_stopped_while_it_serves_ends_in_time(tmp_path: Path) -> None:
    with host(tmp_path / "i") as running, socket.create_connection(running.address.split(":"), 10) as raw:  # type: ignore[arg-type]
        raw.sendall(header(put(ATTEMPT.key("k"), BIG)) + BIG[:1000])
        time.sleep(0.1)
        began = time.monotonic()
        running.server.close()
        assert time.monotonic() - began < 15 and not running.server.running

"""What a run's tiers take on a host: whoever writes there, together no more than `bytes_max`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.errors import StorageError
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.peer_protocol import Target
from orchestrator.rules.records import crc32c
from orchestrator.run import tier_directory, tier_room
from orchestrator.run.prefetch import Here, Prefetch
from orchestrator.run.tier import Beside, OwnTier
from orchestrator.run.tier_keeping import Keeper
from orchestrator.run.tier_room import NoRoom, Room
from orchestrator.run.tier_shelf import Copy, Rejected, Shelf
from tests.support.runs import fill, store_of

ATTEMPT = AttemptId.of(20, 1, 1)
SIZE = 300_000
LIMIT = 500_000  # for one, and not for two


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("room") / "run"
    fill(root, 1)
    return root


class Tiers:
    """Of one run on one host."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root, self.directory = root, str(directory)
        self.run = tier_directory.identity(store_of(root)) or ""
        self.path = Path(tier_directory.of_run(self.directory, self.run))
        self.room = Room(str(self.path))
        self._open: dict[int, OwnTier] = {}

    def files(self) -> int:
        return sum(path.stat().st_size for path in self.path.glob("process-*/**/*") if path.is_file())

    # Whoever writes there. Returns why it does not, '' if it has.

    def own(self, process: int) -> str:
        if process not in self._open:
            tier = OwnTier(tier_directory.of_process(self.directory, self.run, process), "test")
            tier.open_epoch(1, 0)
            self._open[process] = tier
        tier = self._open[process]
        keeper = Keeper(tier, Beside(tier.path, {0, 1}) if process == 0 else None, 1, (), host="vm-a", processes=2)
        try:
            keeper.make_room(ATTEMPT, SIZE, 0)
        except StorageError as error:
            return str(error)
        tier.storage.create(ATTEMPT.key("state/data"), b"x" * SIZE)
        keeper.settled(ATTEMPT)
        return ""

    def copy(self, process: int) -> str:
        """By a server that nobody has told of a limit."""
        copy = Copy(Target(self.run, process, ATTEMPT.key("state/data")), SIZE, crc32c(b"x" * SIZE))
        try:
            Shelf(tier_directory.base(self.directory)).take(copy, iter([b"x" * SIZE]))
        except Rejected as error:
            return error.failure.text
        return ""

    def fetched(self) -> str:
        """Of a step that is larger than what is left beside one of the others."""
        made = Prefetch(store_of(self.root), lambda run: Here(self.directory, 0, 1)).run()
        return next(iter(made.problems), "")


FIRST: dict[str, Callable[[Tiers], str]] = {
    "a process": lambda tiers: tiers.own(0),
    "copies": lambda tiers: tiers.copy(7),
    "an older start's part": lambda tiers: tiers.copy(9),
}
SECOND: dict[str, tuple[Callable[[Tiers], str], str]] = {
    "another process": (lambda tiers: tiers.own(1), "no room in memory on vm-a: this process needs 300000 bytes"),
    "copies": (lambda tiers: tiers.copy(8), "no room: a copy needs 300000 bytes"),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_all_that_hold_on_a_host_take_no_more_than_it_may(first: str, second: str, root: Path, tmp_path: Path) -> None:
    tiers = Tiers(root, tmp_path)
    tiers.room.record(LIMIT)
    assert FIRST[first](tiers) == ""
    then, said = SECOND[second]
    problem, used = then(tiers), tiers.files()
    assert said in problem and f"of the {LIMIT} of bytes_max beside the" in problem, problem
    assert SIZE <= used <= LIMIT
    tiers.room.record(None)
    assert then(tiers) == "" and tiers.files() >= 2 * SIZE, "without a limit both fit"


def test_a_prefetch_takes_no_more_than_a_host_may_hold(root: Path, tmp_path: Path) -> None:
    whole = Tiers(root, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    assert whole.fetched() == ""
    tiers = Tiers(root, tmp_path)
    assert tiers.own(0) == ""
    limit = tiers.files() + whole.files() // 2
    tiers.room.record(limit)
    assert "no room: needs" in (problem := tiers.fetched()) and f"of the {limit} of bytes_max" in problem
    assert SIZE < tiers.files() <= limit
    told = Prefetch(store_of(root), lambda run: Here(str(tmp_path / "told"), 0, 1, bytes_max=1000)).run
    (tmp_path / "told").mkdir()
    assert "of the 1000 of bytes_max" in told().problems[0], "where no job has held anything yet, it can be said"


def test_what_is_reserved_counts_until_it_is_there_or_given_up(root: Path, tmp_path: Path) -> None:
    room = Tiers(root, tmp_path).room
    room.record(1000)
    first = room.reserve(600)
    with pytest.raises(NoRoom, match=r"there are 400 of the 1000 of bytes_max beside the 0 used and 600 reserved"):
        room.reserve(401)
    first.written(500)  # and there it would be
    room.reserve(900).end()
    first.end()
    first.end()
    room.reserve(1000).end()


def test_of_an_attempt_what_lies_there_is_not_counted_twice(root: Path, tmp_path: Path) -> None:
    tiers = Tiers(root, tmp_path)
    tiers.room.record(1000)
    reserved = tiers.room.reserve(600, 3, ATTEMPT)
    part = tiers.path / "process-00003" / ATTEMPT.prefix
    part.mkdir(parents=True)
    (part / "data").write_bytes(b"x" * 500)
    assert (tiers.room.look().room, tiers.room.look().of(ATTEMPT)) == (400, 600)
    (part / "more").write_bytes(b"x" * 300)
    assert (tiers.room.look().room, tiers.room.look().of(ATTEMPT)) == (200, 800), "more than was reserved"
    reserved.end()
    assert tiers.room.look().room == 200


def test_however_many_reserve_at_once_together_they_get_what_there_is(root: Path, tmp_path: Path) -> None:
    room, got = Tiers(root, tmp_path).room, []
    room.record(1000)

    def reserve(number: int) -> None:
        try:
            got.append(room.reserve(90))
        except NoRoom:
            got.append(None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reserve, range(30)))
    made = [one for one in got if one]
    assert len(made) == 11 and len(got) == 30
    for one in made:
        one.end()
    assert room.look().room == 1000


HOLD = """
import sys
from orchestrator.run.tier_room import Room
room = Room(sys.argv[1])
if sys.argv[2] == "reserve":
    kept = room.reserve(600)
    print("ready", flush=True)
    sys.stdin.read()
with room._locked():
    print("ready", flush=True)
    sys.stdin.read()
"""


def other(tiers: Tiers, what: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HOLD, str(tiers.path), what]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


def test_what_another_process_has_reserved_ends_with_it_however_it_dies(root: Path, tmp_path: Path) -> None:
    tiers = Tiers(root, tmp_path)
    tiers.room.record(1000)
    process = other(tiers, "reserve")
    try:
        for _ in range(2):  # looking at it does not end it
            assert tiers.room.look().room == 400
        with pytest.raises(NoRoom):
            tiers.room.reserve(500)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    tiers.room.reserve(1000).end()
    assert sorted(os.listdir(tiers.path / "room")) == ["limit", "lock"]


def test_a_process_that_is_stopped_while_it_looks_keeps_nobody_for_long(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = Tiers(root, tmp_path)
    tiers.room.record(1000)
    monkeypatch.setattr(tier_room, "_WAIT_S", 0.2)
    process = other(tiers, "look")
    try:
        with pytest.raises(StorageError, match=r"another process has been looking at the room there for 0.2 s"):
            tiers.room.reserve(1)
    finally:
        process.kill()
        process.wait()
    tiers.room.reserve(1).end()


def test_a_limit_that_is_none_is_named_and_not_taken_for_none(root: Path, tmp_path: Path) -> None:
    tiers = Tiers(root, tmp_path)
    tiers.room.record(1000)
    (tiers.path / "room" / "limit").write_text("lots")
    with pytest.raises(StorageError, match=r"room/limit: 'lots' is no number of bytes; remove this file"):
        tiers.room.look()
    tiers.room.record(2000)
    assert tiers.room.look().limit == 2000


def test_what_is_freed_while_somebody_looks_is_not_there(root: Path, tmp_path: Path) -> None:
    tiers, stop = Tiers(root, tmp_path), threading.Event()
    tiers.room.record(None)
    part = tiers.path / "process-00003" / ATTEMPT.prefix

    def churn() -> None:
        while not stop.is_set():
            part.mkdir(parents=True, exist_ok=True)
            (part / "data").write_bytes(b"x")
            (part / "data").unlink()
            part.rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert all(tiers.room.look().used <= 1 for _ in range(200))
    finally:
        stop.set()
        thread.join()

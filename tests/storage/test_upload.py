"""Files of this machine on their way to a store: whole and checked there, or not there at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.records import FileEntry, crc32c
from orchestrator.storage import MemoryStorage, PosixStorage, Storage
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_http import Client
from orchestrator.storage.gcs_objects import PIECE_BYTES
from orchestrator.storage.throttle import Throttle
from orchestrator.storage.upload import Unreadable, upload
from tests.support.gcs import emulator, faults, new_root

KEY = "steps/00000001/e0001-a01/state/d/a"
SIZES = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 12345]
STORES: dict[str, Callable[[Path], Storage]] = {
    "posix": lambda path: PosixStorage(str(path / "run")),
    "memory": lambda path: MemoryStorage(),
    "gcs": lambda path: GcsStorage(new_root(), Client(first_wait_s=0.02)),
}


@pytest.fixture
def tier(tmp_path: Path) -> PosixStorage:
    return PosixStorage(str(tmp_path / "tier"))


def put(tier: PosixStorage, size: int) -> FileEntry:
    body = random.Random(size).randbytes(size)
    tier.create(KEY, body)
    return FileEntry(path=KEY, bytes=size, crc32c=crc32c(body))


def unlimited(count: int) -> None: ...


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", STORES)
def test_a_file_of_any_size_arrives_whole_and_may_be_sent_twice(
    kind: str, size: int, tier: PosixStorage, tmp_path: Path
) -> None:
    store, known, passed = STORES[kind](tmp_path), put(tier, size), list[int]()
    upload(tier, store, known, passed.append)
    (durable,) = store.make_durable([KEY], {KEY: known})
    assert (durable.bytes, durable.crc32c) == (size, known.crc32c) and sum(passed) == size
    assert store.get(KEY, 1 << 30) == tier.get(KEY, 1 << 30)
    upload(tier, store, known, unlimited)  # an answer may have been lost


@pytest.mark.parametrize("kind", STORES)
def test_what_is_not_what_was_written_gets_no_name(kind: str, tier: PosixStorage, tmp_path: Path) -> None:
    store, known = STORES[kind](tmp_path), put(tier, 2 * PIECE_BYTES)
    for wrong in (
        FileEntry(path=KEY, bytes=known.bytes, crc32c="00000000"),
        FileEntry(path=KEY, bytes=known.bytes + 1, crc32c=known.crc32c),
        FileEntry(path=KEY, bytes=known.bytes - 1, crc32c=known.crc32c),
        FileEntry(path=f"{KEY}b", bytes=1, crc32c=known.crc32c),
    ):
        with pytest.raises(Unreadable, match=wrong.path):
            upload(tier, store, wrong, unlimited)
        assert store.get(wrong.path, 1 << 30) is None
    (tmp_path / "outside").write_bytes(b"secret")
    (tmp_path / "tier" / f"{KEY}c").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError, match="symbolic link"):
        upload(tier, store, FileEntry(path=f"{KEY}c", bytes=6, crc32c=crc32c(b"secret")), unlimited)


@pytest.mark.parametrize("kind", STORES)
def test_another_ones_object_is_never_taken_for_ours_and_stays(kind: str, tier: PosixStorage, tmp_path: Path) -> None:
    store, known = STORES[kind](tmp_path), put(tier, PIECE_BYTES + 5)
    store.create(KEY, b"theirs")
    with pytest.raises(StorageError, match="another writer was here"):
        upload(tier, store, known, unlimited)
    assert store.get(KEY) == b"theirs"


@pytest.mark.parametrize("kind", STORES)
def test_an_upload_that_is_given_up_leaves_nothing(kind: str, tier: PosixStorage, tmp_path: Path) -> None:
    def give_up(count: int) -> None:
        raise KeyError

    store, known = STORES[kind](tmp_path), put(tier, 2 * PIECE_BYTES)
    with pytest.raises(KeyError):
        upload(tier, store, known, give_up)
    assert list(store.list("")) == []


def test_a_bucket_that_cuts_connections_loses_replies_and_is_busy_gets_the_file_all_the_same(
    tier: PosixStorage, tmp_path: Path
) -> None:
    known, tries = put(tier, 2 * PIECE_BYTES + 7), 0
    with faults(emulator(), too_many=0.1, unavailable=0.1, cut=0.2, lost=0.2, seed=23):
        for _ in range(3):
            store = STORES["gcs"](tmp_path)
            while True:
                try:
                    tries += 1
                    upload(tier, store, known, unlimited)
                    break
                except Unavailable:
                    assert tries < 40
            assert store.make_durable([KEY], {KEY: known})[0].bytes == known.bytes
            assert store.get(KEY, 1 << 30) == tier.get(KEY, 1 << 30)


class _Time:
    def __init__(self) -> None:
        self.now_s = 50.0
        self.stopped = False

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def check(self) -> None:
        if self.stopped:
            raise KeyError


def taken(time: _Time, throttle: Throttle, *counts: int) -> Iterator[float]:
    for count in counts:
        throttle.take(count, time.check)
        yield round(time.now_s - 50.0, 6)


@pytest.mark.parametrize(
    ("bytes_per_s", "counts", "at"),
    [
        (None, [10**9, 10**9], [0.0, 0.0]),
        (1000, [500, 500, 500, 500], [0.0, 0.5, 1.0, 1.5]),
        (1000, [5000, 1], [0.0, 5.0]),
        (1, [1, 1, 1], [0.0, 1.0, 2.0]),
    ],
)
def test_no_more_bytes_go_than_may(bytes_per_s: int | None, counts: list[int], at: list[float]) -> None:
    time = _Time()
    assert list(taken(time, Throttle(bytes_per_s, time.now, time.sleep), *counts)) == at


def test_time_in_which_nothing_goes_is_not_saved_up_and_a_bound_can_be_lifted() -> None:
    time = _Time()
    throttle: Any = Throttle(1000, time.now, time.sleep)
    assert list(taken(time, throttle, 1000)) == [0.0]
    time.now_s += 100
    assert list(taken(time, throttle, 1000, 1000)) == [100.0, 101.0]
    time.stopped = True
    with pytest.raises(KeyError):
        throttle.take(1, time.check)
    time.stopped = False
    throttle.take(10**9)
    before = time.now_s
    throttle.lift()
    throttle.take(10**9)
    assert time.now_s == before

"""Nothing outside the root is created, read, changed or deleted: tables of what may stand in the way, and of what is
tried on it. Whatever stands there is named within seconds, is taken neither for missing nor for damage, and stays."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator import arrays
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.writing import data_files
from orchestrator.errors import Damaged, StorageError, Suspect, Unavailable
from orchestrator.rules import chunk_index, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import RetiredAttempt
from orchestrator.run import stored_step
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, directory
from orchestrator.storage import posix as posix_module
from orchestrator.storage.directory import DEPTH_MAX
from tests.support.builders import head
from tests.support.fakes import HookedStorage
from tests.support.runs import LIKE, fill, kinds, now, state, store_of
from tests.support.snapshots import snapshot

SOON_S = 20.0
KEY = "steps/00000009/e0001-a01/receipts/00000.json"


def device(path: Path, outside: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("devices are made by root only")


def listening(path: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # the kernel takes no long names
        try:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


OBSTACLES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "link to a file": ("a symbolic link", lambda path, outside: path.symlink_to(outside / "file")),
    "relative link": ("a symbolic link", lambda path, outside: path.symlink_to(os.path.relpath(outside, path.parent))),
    "link to a directory": ("a symbolic link", lambda path, outside: path.symlink_to(outside)),
    "link to nothing": ("a symbolic link", lambda path, outside: path.symlink_to(outside / "new")),
    "link to itself": ("a symbolic link", lambda path, outside: path.symlink_to(path.name)),
    "link to a device": ("a symbolic link", lambda path, outside: path.symlink_to("/dev/zero")),
    "pipe": ("a named pipe", lambda path, outside: os.mkfifo(path)),
    "device": ("a device", device),
    "socket": ("a socket", listening),
    "directory": ("a directory", lambda path, outside: path.mkdir()),
}


def write_data(store: PosixStorage, key: str) -> None:
    folder, _, name = key.rpartition("/")
    data_files.write_files(data_files.opener(f"{store.url}/{folder}"), {name: b"elements"})


def read_data(store: PosixStorage, key: str) -> None:
    folder, _, name = key.rpartition("/")
    local = LocalStore(f"{store.root.path}/{folder}")
    try:
        local.read_into(memoryview(bytearray(4)), (name, 0, 4), "w")
    finally:
        local.close()


OPERATIONS: dict[str, Callable[[PosixStorage, str], object]] = {
    "get": lambda store, key: store.get(key),
    "measure": lambda store, key: store.measure(key),
    "create": lambda store, key: store.create(key, b"ours"),
    "delete": lambda store, key: store.delete(key),
    "make_durable": lambda store, key: store.make_durable([key]),
    "link": lambda store, key: store.link(__file__, key),
    "write data": write_data,
    "read data": read_data,
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What belongs to somebody else, laid out as a run is, so that every path through a link finds something."""
    folder = tmp_path / "outside"
    attempt = [f"e0001-a01/{name}" for name in ("receipts/00000.json", "manifest.json")]
    for name in ("file", "00000.json", "receipts/00000.json", *attempt):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    (folder / KEY).parent.mkdir(parents=True)
    (folder / KEY).write_text("precious")
    return folder


@pytest.fixture
def store(root: Path) -> PosixStorage:
    made = PosixStorage(str(root))
    made.create("journal/0", b"first")
    return made


def soon(work: Callable[[], object]) -> object:
    """`work`'s result, or what it raised: but not never."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(timeout=SOON_S)
    finally:
        pool.shutdown(wait=False)


def lstat(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_mode, status.st_ino


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_at_a_key_is_named_and_neither_followed_nor_waited_for(
    obstacle: str, operation: str, store: PosixStorage, root: Path, outside: Path
) -> None:
    kind, put = OBSTACLES[obstacle]
    path = root / KEY
    path.parent.mkdir(parents=True)
    put(path, outside)
    theirs, there = snapshot(outside), lstat(path)
    with pytest.raises(Unavailable, match=f"{path}: is {kind}"):
        soon(lambda: OPERATIONS[operation](store, KEY))
    assert snapshot(outside) == theirs and lstat(path) == there
    assert list((root / ".tmp").iterdir()) == []


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_is_swapped_in_after_the_look_is_not_followed_and_not_waited_for_either(
    obstacle: str, store: PosixStorage, root: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, put = OBSTACLES[obstacle]
    path = root / KEY
    path.parent.mkdir(parents=True)
    put(path, outside)
    theirs = snapshot(outside)
    monkeypatch.setattr(directory, "_kind_at", lambda parent, name: "")  # the look saw a plain file
    for operation in set(OPERATIONS) - {"read data"}:
        with pytest.raises(StorageError):
            soon(lambda operation=operation: OPERATIONS[operation](store, KEY))  # type: ignore[misc]
    assert snapshot(outside) == theirs


ABOVE = ["steps", "steps/00000009", "steps/00000009/e0001-a01", "steps/00000009/e0001-a01/receipts"]


@pytest.mark.parametrize("operation", [*OPERATIONS, "list"])
@pytest.mark.parametrize("linked", ABOVE)
def test_a_link_above_a_key_is_named_and_not_followed(
    linked: str, operation: str, store: PosixStorage, root: Path, outside: Path
) -> None:
    theirs = snapshot(outside)
    below = outside / KEY.removeprefix(linked + "/")
    target = outside if below.is_file() else outside / linked
    (root / linked).parent.mkdir(parents=True, exist_ok=True)
    (root / linked).symlink_to(target)
    assert (root / KEY).is_file()  # as the kernel would find it
    work = OPERATIONS.get(operation, lambda store, key: list(store.list(key)))
    with pytest.raises(
        Unavailable, match=f"{root / linked}: is a symbolic link; nothing below a run's root may be one"
    ):
        soon(lambda: work(store, KEY))
    assert snapshot(outside) == theirs and (root / linked).is_symlink()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_file_where_a_directory_belongs_means_that_nothing_is_below_it(
    operation: str, store: PosixStorage, root: Path
) -> None:
    (root / "steps").mkdir()
    (root / "steps/00000009").write_text("a file")
    if operation in ("get", "measure"):
        assert OPERATIONS[operation](store, KEY) is None
    elif operation == "delete":
        assert store.delete(KEY) is False
    else:
        with pytest.raises((StorageError, Suspect), match=r"00000009.*(ENOTDIR|Not a directory)"):
            OPERATIONS[operation](store, KEY)
    assert (root / "steps/00000009").read_text() == "a file" and list(store.list("steps/00000009/")) == []


def test_a_directory_swapped_for_a_link_at_any_moment_leads_nowhere_else(
    store: PosixStorage, root: Path, outside: Path
) -> None:
    """Not a look before use: a thread swaps a folder for a link, and back, all the time."""
    theirs, done = snapshot(outside), threading.Event()
    folder, aside, link = root / "steps/00000009", root / "aside", root / "steps/link"
    folder.mkdir(parents=True)
    link.symlink_to(outside)

    def swap() -> None:
        while not done.is_set():
            for source, target in ((folder, aside), (link, folder), (folder, link), (aside, folder)):
                with contextlib.suppress(OSError):  # the other side has made the folder again
                    source.rename(target)

    swapping = threading.Thread(target=swap)
    swapping.start()
    rejected = 0
    try:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            for operation in ("create", "get", "delete", "write data"):
                try:
                    found = OPERATIONS[operation](store, "steps/00000009/e0001-a01/manifest.json")
                    assert found != b"precious"
                except StorageError:
                    rejected += 1
    finally:
        done.set()
        swapping.join(10)
    assert snapshot(outside) == theirs and rejected


# Listings.


@pytest.mark.parametrize("obstacle", [name for name in OBSTACLES if name != "directory"])
def test_a_listing_shows_what_is_no_object_and_goes_on(
    obstacle: str, store: PosixStorage, root: Path, outside: Path
) -> None:
    kind, put = OBSTACLES[obstacle]
    store.create("steps/1/a", b"1")
    store.create("steps/3", b"333")
    put(root / "steps/2", outside)
    assert [(entry.key, entry.bytes, entry.problem) for entry in store.list("steps/")] == [
        ("steps/1/a", 1, ""),
        ("steps/2", 0, f"is {kind}"),
        ("steps/3", 3, ""),
    ]


ODD_NAMES = ["a\\b", "a\nb", "x\x01y", "\x1b[2J", os.fsdecode(b"\xff\xfe")]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_no_key_can_have_is_listed_as_such_and_can_be_deleted(
    name: str, store: PosixStorage, root: Path
) -> None:
    (root / "steps/1").mkdir(parents=True)
    (root / "steps/1" / name).write_text("12")
    (entry,) = store.list("steps/")
    assert (entry.key, entry.bytes) == (f"steps/1/{name}", 2)
    assert entry.problem == "has a name that no object of a run can have"
    assert store.delete(entry.key) is True
    assert list(store.list("")) == list(store.list("journal/")) and not (root / "steps/1").exists()


def test_a_folder_that_cannot_be_listed_is_not_empty_and_stops_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal_store = retired(root, 8, 9, 10)
    opened = os.open

    def failing(path: str, flags: int, *more: int, dir_fd: int | None = None) -> int:
        if path == "state" and "00000009" in os.readlink(f"/proc/self/fd/{dir_fd}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, flags, *more, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        problems = {entry.key: entry.problem for entry in journal_store.storage.list("steps/") if entry.problem}
        assert problems == {"steps/00000009/e0001-a01/state": "cannot be listed: EIO (Input/output error)"}
        assert len(collect(journal_store).failed) == 1 and left(journal_store) == [9]
    assert collect(journal_store).failed == [] and left(journal_store) == []


def test_a_deep_hole_ends_a_listing_soon(store: PosixStorage, root: Path) -> None:
    deep = root / "steps" / "/".join("d" * 2 * DEPTH_MAX)
    deep.mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    (entry,) = store.list("steps/")
    assert "below" in entry.problem and len(os.listdir("/proc/self/fd")) <= before + 1


def test_listing_and_reading_hold_no_descriptors(store: PosixStorage) -> None:
    for number in range(3):
        store.create(f"steps/{number}/a/b/c", b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert len(list(store.list(""))) == 4
        assert store.get("steps/1/a/b/c") == b"x" and store.get("steps/none/x") is None
        store.create("steps/9/a", b"x")
        store.delete("steps/9/a")
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_listings_of_the_root_at_once_do_not_disturb_each_other(store: PosixStorage) -> None:
    for number in range(300):
        store.create(f"k{number:03d}", b"")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: len(list(store.list(""))), range(40)))
    assert set(found) == {301}


# The journal.


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stands_at_the_newest_entry_is_never_an_older_journal(obstacle: str, root: Path, outside: Path) -> None:
    kind, put = OBSTACLES[obstacle]
    fill(root, 1, 2)
    path = root / "journal" / f"{len(kinds(root)):020d}.json"
    put(path, outside)
    with pytest.raises(Unavailable, match=f"{path}: is {kind}"):
        soon(lambda: store_of(root).head())
    before = snapshot(root / "journal") if path.is_dir() else sorted(os.listdir(root / "journal"))
    with pytest.raises(Unavailable, match=f"{path}: is {kind}"):
        soon(lambda: oc.Agent(root, options=now()).restore(LIKE))
    assert (snapshot(root / "journal") if path.is_dir() else sorted(os.listdir(root / "journal"))) == before


# Deleting.


def retired(root: Path, *steps: int) -> JournalStore:
    """A run that has retired these steps; each of their attempts holds one file and a manifest."""
    journal_store = store_of(root)
    gone = tuple(RetiredAttempt(step=step, attempt="e0001-a01", reason="aborted") for step in steps)
    journal_store.storage.create(keys.journal_key(0), encode(head(epoch=1, version=0, retired=gone)))
    for step in steps:
        for name in ("manifest.json", "state/d/data"):
            journal_store.storage.create(AttemptId(step, "e0001-a01").key(name), b"1234")
    return journal_store


def attempt(root: Path, step: int) -> Path:
    return root / f"steps/{step:08d}/e0001-a01"


def left(journal_store: JournalStore) -> list[int]:
    return [gone.step for gone in journal_store.require_head().retired]


LINKED = {
    "the step": lambda root: root / "steps/00000009",
    "the attempt": lambda root: attempt(root, 9),
    "a folder in it": lambda root: attempt(root, 9) / "state",
    "a folder in a folder": lambda root: attempt(root, 9) / "state/d",
    "a file in it": lambda root: attempt(root, 9) / "state/d/data",
    "its manifest": lambda root: attempt(root, 9) / "manifest.json",
}


@pytest.mark.parametrize("linked", LINKED)
def test_what_was_moved_to_another_disk_and_linked_is_not_deleted_but_the_rest_is(
    linked: str, root: Path, tmp_path: Path
) -> None:
    journal_store = retired(root, 8, 9, 10)
    path, cold = LINKED[linked](root), tmp_path / "cold"
    shutil.move(path, cold)
    path.symlink_to(cold)
    theirs = snapshot(cold) if cold.is_dir() else {"": cold.read_text()}
    for _ in range(2):  # and again, each time
        result = collect(journal_store)
        (failed,) = result.failed
        assert f"{path}: is a symbolic link" in failed
        assert (snapshot(cold) if cold.is_dir() else {"": cold.read_text()}) == theirs and path.is_symlink()
        assert left(journal_store) == [9]
    assert sorted(os.listdir(root / "steps")) == ["00000009"]
    plain = [
        entry.key for entry in journal_store.storage.list("") if not entry.problem and entry.key.startswith("steps/")
    ]
    assert plain == []  # whatever of it could go has gone
    path.unlink()
    collect(journal_store)
    assert left(journal_store) == []


def test_a_folder_swapped_for_a_link_after_listing_deletes_nothing_elsewhere(root: Path, outside: Path) -> None:
    theirs = snapshot(outside)
    (outside / "data").write_text("precious")
    folder = attempt(root, 9) / "state/d"
    retired(root, 8, 9)

    def swap(operation: str, key: str) -> None:
        if operation == "delete" and not folder.is_symlink():
            folder.rename(root / "aside")
            folder.symlink_to(outside)

    journal_store = JournalStore(HookedStorage(PosixStorage(str(root)), swap), "test")
    result = collect(journal_store)
    assert (outside / "data").read_text() == "precious"
    assert {**snapshot(outside)}.items() >= theirs.items()
    assert len(result.failed) == 1 and "is a symbolic link" in result.failed[0]
    assert left(journal_store) == [9]


@pytest.mark.parametrize("name", [*ODD_NAMES, "x/a\\b/c", "...", " ", "-rf", "e0001-a01"])
def test_a_plain_file_of_any_name_goes_with_the_attempt_that_it_is_in(name: str, root: Path) -> None:
    journal_store = retired(root, 8, 9, 10)
    path = attempt(root, 9) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    result = collect(journal_store)
    assert result.failed == [] and result.files == 7 and left(journal_store) == []
    assert [path for path in (root / "steps").glob("**/*") if not path.is_dir()] == []


@pytest.mark.parametrize("obstacle", ["pipe", "socket", "device"])
def test_a_special_file_in_an_attempt_stays_and_is_reported_and_all_the_rest_goes(
    obstacle: str, root: Path, outside: Path
) -> None:
    journal_store = retired(root, 8, 9, 10)
    kind, put = OBSTACLES[obstacle]
    put(attempt(root, 9) / "odd", outside)
    result = soon(lambda: collect(journal_store))
    assert f"is {kind}" in result.failed[0] and left(journal_store) == [9]  # type: ignore[attr-defined]
    assert [path for path in root.glob("steps/**/*") if not path.is_dir()] == [attempt(root, 9) / "odd"]


@pytest.mark.parametrize("name", ["e00001-a01", "e0001-a1", "e0001-a001", "e1-a01", "tmp", "e0000-a00\\x"])
def test_a_folder_that_no_attempt_is_called_stops_no_collection_and_stays(name: str, root: Path) -> None:
    journal_store = retired(root, 8)
    (root / "steps/00000009" / name).mkdir(parents=True)
    (root / "steps/00000009" / name / "x").write_text("x")
    assert collect(journal_store).failed == [] and left(journal_store) == []
    assert (root / "steps/00000009" / name / "x").exists()


def test_old_temporaries_are_swept_in_the_run_and_nowhere_else(root: Path, outside: Path) -> None:
    fill(root, 1)
    shutil.rmtree(root / ".tmp")
    (root / ".tmp").symlink_to(outside)
    os.utime(outside / "file", (1, 1))
    with pytest.raises(Unavailable, match=r"\.tmp: is a symbolic link"):
        PosixStorage(str(root)).create("journal/9", b"x")
    assert (outside / "file").exists()
    (root / ".tmp").unlink()
    (root / ".tmp").mkdir()
    (root / ".tmp/link").symlink_to(outside / "file")
    os.utime(root / ".tmp/link", (1, 1), follow_symlinks=False)
    PosixStorage(str(root)).create("stray", b"x")
    assert (outside / "file").exists() and (root / ".tmp/link").is_symlink()


# A whole job beside it.


def test_a_job_goes_on_saving_and_deleting_beside_a_linked_old_step(root: Path, tmp_path: Path) -> None:
    fill(root, 1, 2)
    (root / "steps/00000001").rename(tmp_path / "cold")
    (root / "steps/00000001").symlink_to(tmp_path / "cold")
    theirs = snapshot(tmp_path / "cold")
    with oc.Agent(root, options=now(), keep=oc.last(2)) as agent:
        agent.restore(LIKE)
        for step in (3, 4, 5, 6):
            agent.save(step, state(step))
    assert snapshot(tmp_path / "cold") == theirs
    assert oc.open_run(root).all_steps() == [2, 5, 6] and not (root / "steps/00000003").exists()
    assert oc.open_run(root).restore().step == 6


@pytest.mark.parametrize("compression", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("part", ["manifest.json", "intent.json", "state", "state/manifest.ocdbt", "state/**/d/*"])
def test_a_step_behind_a_link_is_not_read_and_not_damaged(
    part: str, compression: bool, root: Path, tmp_path: Path
) -> None:
    with oc.Agent(root, options=now(compression=compression)) as agent:
        for step in (1, 2):
            agent.save(step, state(step))
    folder = next((root / "steps/00000002").iterdir())
    path = next(folder.glob(part))
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    before = kinds(root)
    with pytest.raises(Unavailable, match="is a symbolic link"):
        oc.open_run(root).restore(step=2)
    assert kinds(root) == before


@pytest.mark.parametrize("obstacle", [name for name in OBSTACLES if name != "directory"])
@pytest.mark.parametrize("name", ["manifest.ocdbt", "ocdbt.process_0/d/file"])
def test_what_a_library_opens_by_its_path_is_looked_at_before(
    name: str, obstacle: str, root: Path, outside: Path
) -> None:
    kind, put = OBSTACLES[obstacle]
    with oc.Agent(root, options=now(compression=True)) as agent:
        agent.save(1, state(1))
    journal_store = store_of(root)
    live = journal_store.find(1)
    assert live is not None
    stored = chunk_index.stored(journal_store.step(live).manifest)
    folder = root / "steps/00000001/e0001-a01/state"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    put(folder / name, outside)
    with pytest.raises(Unavailable, match=f"{folder / name}: is {kind}"):
        soon(lambda: arrays.check(f"file://{folder}", stored))


PLANTED = ["intent.json", "extra.json", "manifest.json", "receipts/00000.json", "receipts", "state", "state/_METADATA"]


@pytest.mark.parametrize("name", [*PLANTED, "state/manifest.ocdbt", "state/ocdbt.process_0", "state/ocdbt.process_0/d"])
def test_a_link_planted_where_the_next_save_will_write_takes_nothing_outside(
    name: str, root: Path, outside: Path
) -> None:
    fill(root, 1)
    theirs = snapshot(outside)
    path = root / "steps/00000010/e0002-a01" / name
    with oc.Agent(root, options=now(on_save_failure="warn")) as agent:
        agent.restore(LIKE)
        path.parent.mkdir(parents=True)
        path.symlink_to(outside if "." not in name else outside / "file")
        agent.save(10, state(10))
        agent.save(11, state(11))
        assert agent.failures == 1 and agent.all_steps() == [1, 11]
    assert snapshot(outside) == theirs


# Sizes.


def holey(path: Path, size: int = 200 << 30) -> None:
    """A file of 200 GB that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


READS: dict[str, Callable[[PosixStorage], object]] = {
    "get": lambda store: store.get(KEY),
    "get with a bound": lambda store: store.get(KEY, 10),
    "create": lambda store: store.create(KEY, b"ours"),
    "tree": lambda store: LocalStore(f"{store.root.path}/{KEY.rpartition('/')[0]}").index(),
}


@pytest.mark.parametrize("read", READS)
def test_what_is_larger_than_anything_a_run_writes_is_not_read(read: str, store: PosixStorage, root: Path) -> None:
    for name in (KEY, KEY.replace("00000.json", "manifest.ocdbt")):
        holey(root / name)
    with pytest.raises(Unavailable, match=f"{200 << 30} bytes, at most"):
        soon(lambda: READS[read](store))


@pytest.mark.parametrize("which", ["manifest", "journal", "receipt", "intent"])
def test_a_record_with_a_hole_of_200_gb_is_an_error_and_not_damage(which: str, root: Path) -> None:
    fill(root, 1, 2)
    before = kinds(root)
    folder = next((root / "steps/00000002").iterdir())
    names = {"journal": f"journal/{len(before):020d}.json", "receipt": f"{folder}/receipts/00000.json"}
    path = root / names.get(which, f"{folder}/{which}.json")
    path.unlink(missing_ok=True)
    holey(path)
    with pytest.raises((Unavailable, Damaged), match=f"{200 << 30} bytes"):
        soon(lambda: oc.open_run(root).restore(step=2))
    path.unlink()
    assert kinds(root) == before


def test_a_process_may_have_a_state_of_any_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stored_step, posix_module):
        monkeypatch.setattr(module, "RECORD_BYTES_MAX", 100_000)
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, state(1), process_state=bytes(200_000))
    assert oc.open_run(root).restore().process_states[0] == bytes(200_000)

"""One suite for every store: `memory` is the executable specification, the others must do as it does.

A new adapter is one more line in STORES. What only the POSIX store promises (fsync, hard links) stands at the end.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import StorageError, Unavailable, UnsafeKey, UsageError
from orchestrator.rules import journal
from orchestrator.rules.codec import encode
from orchestrator.rules.records import FileEntry, crc32c, file_entry
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import Created, Entry, Exists, MemoryStorage, PosixStorage, Storage, open_storage
from orchestrator.storage.port import Gone
from orchestrator.storage.sources import Source
from tests.support.builders import head, live
from tests.support.gcs import new_root
from tests.support.snapshots import snapshot
from tests.support.tier_servers import Served

STORES: dict[str, Callable[[Path], Storage]] = {
    "memory": lambda folder: MemoryStorage(),
    "posix": lambda folder: PosixStorage(str(folder / "run")),
    "gcs": lambda folder: open_storage(new_root()),
    "peer": lambda folder: Served(),  # what another host reads
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return STORES[request.param](tmp_path)


def keys(store: Storage, prefix: str, start: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix, start)]


def test_a_part_of_an_object_is_read_without_the_rest(store: Storage) -> None:
    if isinstance(store, MemoryStorage):
        pytest.skip("objects in memory are read whole")
    body = bytes(range(256)) * 40
    store.create("a/b", body)
    source = Source("store", store)
    part = bytearray(100)
    for offset, expected in ((0, 100), (300, 100), (len(body) - 7, 7), (len(body), 0), (len(body) + 5, 0)):
        file = source.open("a/b")
        assert file.read(memoryview(part), offset) == expected
        assert part[:expected] == body[offset : offset + expected]
        file.close()
    with pytest.raises((Gone, FileNotFoundError)):
        source.open("a/c").read(memoryview(part), 0)


def test_what_was_created_is_read_back(store: Storage) -> None:
    for key, body in {"a": b"", "b/c/d": b"\0\xff" * 1000, "b/ü /.x": b"2"}.items():
        assert store.get(key) is None
        assert store.create(key, body) == Created()
        assert store.get(key) == body


def test_a_taken_key_is_not_changed_and_its_body_is_handed_back(store: Storage) -> None:
    store.create("journal/0", b"theirs")
    assert store.create("journal/0", b"ours") == Exists(b"theirs")
    assert store.create("journal/0", b"") == Exists(b"theirs")
    assert store.get("journal/0") == b"theirs"


def test_our_own_body_under_the_key_is_our_own_lost_reply(store: Storage) -> None:
    body = b'{"write_id":"4f0c"}'
    assert store.create("journal/0", body) == Created()
    assert store.create("journal/0", bytes(bytearray(body))) == Created()
    assert store.create("journal/0", b'{"write_id":"77aa"}') == Exists(body)


def test_of_32_writers_of_one_key_exactly_one_wins_and_all_others_are_told_its_body(store: Storage) -> None:
    for round_number in range(5):
        key = f"journal/{round_number}"
        bodies = [f"writer {index}".encode() * 50 for index in range(32)]
        ready = threading.Barrier(32)

        def write(body: bytes, key: str = key, ready: threading.Barrier = ready) -> Created | Exists:
            ready.wait(30)
            return store.create(key, body)

        with ThreadPoolExecutor(32) as pool:
            outcomes = list(pool.map(write, bodies))
        (winner,) = [body for body, outcome in zip(bodies, outcomes, strict=True) if outcome == Created()]
        assert store.get(key) == winner
        assert [outcome for outcome in outcomes if outcome != Created()] == [Exists(winner)] * 31


def test_list_is_in_key_order_with_sizes_and_honours_prefix_and_start(store: Storage) -> None:
    for key in ("journal/2", "journal/10", "journal/1", "journal-x", "steps/1/a", "steps/1-b"):
        store.create(key, key.encode())
    assert keys(store, "journal/") == ["journal/1", "journal/10", "journal/2"]
    assert keys(store, "journal/", start="journal/10") == ["journal/10", "journal/2"]
    assert keys(store, "journal/1") == ["journal/1", "journal/10"]
    assert keys(store, "journal") == ["journal-x", "journal/1", "journal/10", "journal/2"]
    assert keys(store, "steps/1") == ["steps/1-b", "steps/1/a"]
    assert keys(store, "") == sorted(keys(store, ""))
    assert len(keys(store, "")) == 6
    assert keys(store, "nothing/") == keys(store, "journal/1/") == keys(store, "", start="z") == []
    assert list(store.list("journal/10")) == [Entry("journal/10", 10)]


def test_list_and_get_see_every_change_at_once(store: Storage) -> None:
    for index in range(5):
        store.create(f"a/{index}", b"x")
        assert len(keys(store, "a/")) == index + 1
    store.delete("a/3")
    assert keys(store, "a/") == ["a/0", "a/1", "a/2", "a/4"]
    assert store.get("a/3") is None


def test_delete_says_whether_there_was_something_and_the_key_is_free_again(store: Storage) -> None:
    assert store.delete("a/b") is False
    store.create("a/b", b"1")
    store.create("a/c", b"2")
    assert store.delete("a/b") is True
    assert store.delete("a/b") is False
    assert store.get("a/c") == b"2"
    assert store.create("a/b", b"3") == Created()


def test_seal_returns_size_and_checksum_in_the_order_given(store: Storage) -> None:
    big = os.urandom((4 << 20) + 5)
    store.create("s/b", big)
    store.create("s/a/x", b"123456789")
    large, small = store.make_durable(["s/b", "s/a/x"])
    assert large == FileEntry(path="s/b", bytes=len(big), crc32c=crc32c(big))
    # A store that knows CRC-32C without reading (an object store's metadata) has no CRC-32 to offer.
    assert small.crc32 in ("cbf43926", "")
    assert small == FileEntry(path="s/a/x", bytes=9, crc32c="e3069283", crc32=small.crc32)
    assert store.make_durable([]) == ()


def test_what_the_writer_counted_is_believed_as_far_as_the_store_does_not_know_better(store: Storage) -> None:
    store.create("s/a", b"four")
    wanted = FileEntry(path="s/a", bytes=4, crc32c=crc32c(b"four"))
    assert store.make_durable(["s/a"], {"s/a": wanted}) == (wanted,)
    with pytest.raises(StorageError, match=r"s/a: .*has 4 bytes.* 5 "):
        store.make_durable(["s/a"], {"s/a": FileEntry(path="s/a", bytes=5, crc32c=wanted.crc32c)})


def test_sealing_what_is_not_there_is_an_error_that_names_it(store: Storage) -> None:
    store.create("s/a", b"1")
    with pytest.raises(StorageError, match="s/gone"):
        store.make_durable(["s/a", "s/gone"])


def test_an_object_larger_than_anybody_expects_is_not_read(store: Storage) -> None:
    store.create("a", b"12345")
    assert store.get("a", 5) == b"12345" and store.get("b", 0) is None
    with pytest.raises(Unavailable, match=r"a: has 5 bytes, at most 4 .*expected"):
        store.get("a", 4)


def test_an_object_is_measured_as_the_store_has_it(store: Storage) -> None:
    store.create("a", b"12345")
    for expected in (None, 5):
        found = store.measure("a", expected)
        assert found is not None and (found.bytes, found.crc32c) == (5, crc32c(b"12345"))
    found = store.measure("a", 4)
    assert found is not None and found.bytes == 5 and found.crc32c in ("", crc32c(b"12345"))
    assert store.measure("b") is None and store.measure("b", 1) is None


@pytest.mark.parametrize("key", ["", "../x", "a/../../x", "/etc/x", "a//b", "a/", "a\\b", "a\nb", "\x1b[2J", "\udcff"])
def test_a_key_that_could_leave_the_root_is_rejected_by_the_store_itself(store: Storage, key: str) -> None:
    with pytest.raises(UnsafeKey):
        store.create(key, b"x")
    assert keys(store, "") == []


def test_a_journal_with_two_writers_is_one_linear_log(store: Storage) -> None:
    """What all of the rest stands on: racing appends through the journal_store lose nothing and skip nothing."""
    JournalStore(store, "first").append(journal.open_epoch)

    def pin_steps(writer: int) -> None:
        journal_store = JournalStore(store, f"writer {writer}")
        for number in range(5):
            entry = live(10 * writer + number, f"e0001-a{writer + 1:02d}")
            journal_store.append(partial(journal.commit, epoch=1, entry=entry, keep=None))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(pin_steps, range(4)))
    entries = list(JournalStore(store, "reader").entries())
    assert [entry.version for entry in entries] == list(range(21))
    assert {entry.step for entry in entries[-1].live} == {
        10 * writer + number for writer in range(4) for number in range(5)
    }
    for older, newer in itertools.pairwise(entries):
        assert newer.live[:-1] == older.live


KEYS = st.sampled_from(["a", "b/c", "b/d", "b-e", "f/g/h", "f/g/i"])
OPERATIONS = st.one_of(
    st.tuples(st.just("create"), KEYS, st.binary(max_size=3)),
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("list"), st.sampled_from(["", "b", "b/", "f/g/", "x/"]), st.sampled_from(["", "b/d"])),
)


def perform(store: Storage, operation: tuple[Any, ...]) -> Any:
    name, *arguments = operation
    result = getattr(store, name)(*arguments)
    return list(result) if name == "list" else result


@pytest.mark.parametrize("kind", [kind for kind in STORES if kind != "memory"])
@settings(max_examples=25)
@given(operations=st.lists(OPERATIONS, max_size=25))
def test_any_sequence_of_calls_answers_as_the_specification_does(kind: str, operations: list[tuple[Any, ...]]) -> None:
    specification = MemoryStorage()
    with tempfile.TemporaryDirectory() as folder:
        store = STORES[kind](Path(folder))
        for operation in operations:
            assert perform(store, operation) == perform(specification, operation)


# The POSIX store.


@pytest.fixture
def posix(root: Path) -> PosixStorage:
    return PosixStorage(str(root))


def test_opening_and_reading_a_store_creates_nothing(posix: PosixStorage, tmp_path: Path) -> None:
    assert posix.get("journal/0") is None
    assert keys(posix, "") == []
    assert posix.delete("journal/0") is False
    assert snapshot(tmp_path) == {}


def test_an_object_is_a_plain_file_that_is_linked_once(posix: PosixStorage, root: Path) -> None:
    posix.create("journal/0", b"body")
    assert (root / "journal/0").read_bytes() == b"body"
    assert (root / "journal/0").stat().st_nlink == 1
    assert list((root / ".tmp").iterdir()) == []


def test_stray_files_links_and_unfinished_temporaries_are_not_objects(posix: PosixStorage, root: Path) -> None:
    JournalStore(posix, "test").storage.create("journal/00000000000000000000.json", encode(head(version=0)))
    (root / ".tmp" / "crashed").write_bytes(b"half")
    (root / "journal" / "link").symlink_to("/etc/passwd")
    (root / "journal" / "folder").mkdir()
    (root / "journal" / "00000000000000000009.json~").write_bytes(b"an editor's copy")
    (root / "journal" / ".DS_Store").write_bytes(b"")
    (root / "away").symlink_to("/etc")
    listed = list(posix.list(""))
    assert not any(entry.key.startswith((".tmp", "journal/folder")) for entry in listed)
    assert {entry.key: entry.problem for entry in listed if entry.problem} == {
        "away": "is a symbolic link",
        "journal/link": "is a symbolic link",
    }
    found = JournalStore(posix, "test").head()
    assert found is not None and found.version == 0


def test_deleting_the_last_object_removes_its_empty_directories_but_not_the_root(
    posix: PosixStorage, root: Path
) -> None:
    posix.create("steps/1/e0001-a01/state/d/x", b"1")
    posix.create("steps/2/x", b"1")
    posix.delete("steps/1/e0001-a01/state/d/x")
    assert not (root / "steps/1").exists() and (root / "steps/2/x").exists()
    posix.delete("steps/2/x")
    assert root.is_dir()


def test_creating_beside_a_delete_that_prunes_the_same_directory_never_fails(posix: PosixStorage) -> None:
    """A collector removes the last file of an old attempt while a new attempt of that step writes its first."""
    deadline = time.monotonic() + 1

    def churn(name: str) -> None:
        while time.monotonic() < deadline:
            assert posix.create(f"steps/1/{name}/x", b"1") == Created()
            assert posix.delete(f"steps/1/{name}/x")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, ("e0001-a01", "e0002-a01", "e0003-a01", "e0004-a01")))


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The kernel rejects writes beyond the limit (EFBIG): a full disk without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_disk_rejects_leaves_nothing_and_names_the_path(posix: PosixStorage, root: Path) -> None:
    posix.create("journal/0", b"x")
    before = snapshot(root)
    with (
        file_size_limit(1 << 20),
        pytest.raises(StorageError, match=rf"create {root}/journal/1: EFBIG \(File too large\)"),
    ):
        posix.create("journal/1", b"x" * (3 << 20))
    assert snapshot(root) == before
    assert posix.create("journal/1", b"x" * (3 << 20)) == Created()


def test_what_a_crash_left_in_tmp_goes_after_an_hour_and_what_is_being_written_stays(tmp_path: Path) -> None:
    posix = PosixStorage(str(tmp_path / "run"))
    posix.create("journal/0", b"zero")
    stale, fresh = tmp_path / "run/.tmp/stale", tmp_path / "run/.tmp/fresh"
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (0, stale.stat().st_mtime - 3700))
    posix.create("journal/1", b"one")
    assert stale.exists()  # once per process is enough
    PosixStorage(str(tmp_path / "run")).create("journal/2", b"two")
    assert not stale.exists()
    assert fresh.exists()


def test_a_root_below_a_file_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    store = PosixStorage(str(tmp_path / "file" / "run"))
    with pytest.raises(StorageError, match=r"create .*/file/run/journal/0: ENOTDIR"):
        store.create("journal/0", b"x")
    assert store.get("journal/0") is None
    assert keys(store, "") == []


@contextmanager
def system_calls(log: Path) -> Iterator[None]:
    """Record this process's file system calls below, with the kernel's own view of each descriptor."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    names = "trace=fsync,fdatasync,link,linkat,rename,renameat,renameat2,mkdir,mkdirat"
    command = ["strace", "-f", "-y", "-qq", "-e", names, "-e", "signal=none", "-o", str(log), "-p", str(os.getpid())]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
            if tracer.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"strace cannot attach: {tracer.stderr.read() if tracer.stderr else ''}")
            time.sleep(0.01)
        time.sleep(0.1)  # the other threads are attached one after another
        yield
    finally:
        tracer.terminate()
        tracer.wait(10)
        if tracer.stderr:
            tracer.stderr.close()


INJECTED = {
    "link:error=EPERM": "EPERM (Operation not permitted): this file system has no hard links",
    "link:error=EOPNOTSUPP": "(Operation not supported): this file system has no hard links",
    "link:retval=0": "a hard link here is not one file with two names",
    "link:error=EIO": "EIO (Input/output error)",
    "fsync:error=EINVAL": "EINVAL (Invalid argument)",
}


@pytest.mark.parametrize("fault", INJECTED)
def test_a_mount_without_hard_links_or_fsync_is_rejected_when_the_run_is_opened(fault: str, root: Path) -> None:
    """gcsfuse has no hard links; a link that only seems to be made is one that two writers could make."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    code = (
        "import sys; from orchestrator.errors import StorageError; from orchestrator.storage import PosixStorage\n"
        "try: print(PosixStorage(sys.argv[1]).create('journal/0', b'x'))\n"
        "except StorageError as error: print('rejected:', error)"
    )
    call, _, what = fault.partition(":")
    both = "link,linkat" if call == "link" else call
    trace = ["strace", "-f", "-qq", "-e", f"trace={both}", "-e", f"inject={both}:{what}", "-o", os.devnull]
    done = subprocess.run(
        [*trace, sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=60, check=False
    )
    if not done.stdout:
        pytest.skip(f"strace cannot trace here: {done.stderr[:200]}")
    assert done.stdout.startswith("rejected: ") and INJECTED[fault] in done.stdout
    assert not any(path.is_file() for path in root.rglob("*"))


def calls(log: Path, root: Path) -> list[str]:
    """`fsync /journal`, `link /journal/0`, ...: what was done below the root, temporaries as `/.tmp/*`. A name that is
    given with a descriptor of its directory is one with it."""
    found = []
    begun: dict[str, str] = {}  # thread -> the call that another thread's line has interrupted
    for text in log.read_text().splitlines():
        thread, line = text.split(maxsplit=1)
        if line.endswith("<unfinished ...>"):
            begun[thread] = line.removesuffix("<unfinished ...>")
        elif line.startswith("<..."):
            line = begun.pop(thread, "") + line.partition("resumed>")[2]
        match = re.search(r"\b(fsync|link|linkat|rename\w*|mkdir|mkdirat)\((.*)\) += 0", line)
        if match:
            whole = re.sub(r'\d+<([^>]*)>, "([^"]*)"', r"\1/\2", match[2])
            paths = re.findall(rf"{re.escape(str(root))}([^\s\">,]*)", whole)
            name = match[1].removesuffix("at")
            found.append(f"{name} {re.sub(r'/.tmp/[0-9a-f]+', '/.tmp/*', paths[-1] or '/') if paths else '?'}")
    return found


def test_an_object_is_durable_before_it_has_a_name_and_its_name_before_create_returns(
    posix: PosixStorage, root: Path, tmp_path: Path
) -> None:
    posix.create("journal/0", b"first")
    with system_calls(tmp_path / "log"):
        assert posix.create("journal/1", b"second") == Created()
    assert calls(tmp_path / "log", root) == ["fsync /.tmp/*", "link /journal/1", "fsync /journal"]


def test_new_directories_are_made_durable_from_the_top(posix: PosixStorage, root: Path, tmp_path: Path) -> None:
    posix.create("journal/0", b"first")
    with system_calls(tmp_path / "log"):
        posix.create("steps/1/a", b"x")
    assert calls(tmp_path / "log", root) == [
        *("fsync /.tmp/*", "mkdir /steps", "fsync /", "mkdir /steps/1", "fsync /steps"),
        *("link /steps/1/a", "fsync /steps/1"),
    ]


def test_seal_makes_files_and_every_directory_above_them_durable(
    posix: PosixStorage, root: Path, tmp_path: Path
) -> None:
    folder = root / "steps" / "1" / "state" / "d"
    folder.mkdir(parents=True)
    for name in ("x", "y"):
        (folder / name).write_bytes(b"by TensorStore")
    with system_calls(tmp_path / "log"):
        posix.make_durable([f"steps/1/state/d/{name}" for name in ("x", "y")])
    done = calls(tmp_path / "log", root)
    directories = ("/steps/1/state/d", "/steps/1/state", "/steps/1", "/steps", "/")
    files = ("/steps/1/state/d/x", "/steps/1/state/d/y")
    assert sorted(done) == sorted(f"fsync {path}" for path in (*files, *directories))  # in any order: all, then return


@pytest.mark.parametrize(
    ("sizes", "known", "quick_s", "here"),
    [
        ([10, 10], True, 60.0, 4),  # two files and two directories
        ([10, 10], False, 60.0, 0),  # to be read, too
        ([10, 1 << 20], True, 60.0, 0),
        ([10, 10], True, -1.0, 1),  # the first has taken long
    ],
)
def test_a_few_small_files_are_synced_on_the_calling_thread_while_that_is_quick(
    sizes: list[int],
    known: bool,
    quick_s: float,
    here: int,
    posix: PosixStorage,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, size in enumerate(sizes):
        (root / f"d/{number}").parent.mkdir(parents=True, exist_ok=True)
        (root / f"d/{number}").write_bytes(bytes(size))
    threads, fsync = list[threading.Thread](), os.fsync

    def noted(number: int) -> None:
        threads.append(threading.current_thread())
        fsync(number)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr("orchestrator.storage.posix._QUICK_S", quick_s)
    entries = {f"d/{number}": file_entry(f"d/{number}", bytes(size)) for number, size in enumerate(sizes)}
    assert len(posix.make_durable(entries, entries if known else None)) == 2
    assert len(threads) == 4 and threads.count(threading.current_thread()) == here


# Which store a root means.


def test_a_root_is_a_path_or_a_file_url(tmp_path: Path) -> None:
    for root in (str(tmp_path / "run"), f"file://{tmp_path}/run"):
        assert open_storage(root).url == f"file://{tmp_path}/run"
    assert open_storage("some/run").url == f"file://{os.getcwd()}/some/run"
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(("root", "said"), [("", "root is empty"), ("s3://bucket/run", "no storage for s3://")])
def test_a_root_that_no_store_serves_is_a_usage_error(root: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_storage(root)

"""Storage in a directory of a POSIX file system (local disk, or a shared one with hard links and fsync).

An object is written to a temporary file in `<root>/.tmp`, fsynced, hard-linked to its key (link fails if the key is
taken, on every host at once) and its directory fsynced. No rename, so nothing is ever replaced. Nothing outside the
root is reached: everything goes through `directory.Root`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO

import crc32c

from orchestrator import failpoints
from orchestrator.errors import OutcomeUnknown, StorageError
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import TEMPORARY, check_key
from orchestrator.rules.records import SMALL_FILE_BYTES, FileEntry, crc32
from orchestrator.storage.directory import again_if_pruned, reason, root_at, storage_error
from orchestrator.storage.port import Created, Entry, Exists, TooLarge, checked_size

_SYNC_THREADS = 8
_LITTLE_BYTES = 1 << 20  # of all files that are synced together
_QUICK_S = 0.003  # for a sync
_STALE_S = 3600.0
_PIECE_BYTES = 8 << 20  # of a file that is copied
_MISSING = (FileNotFoundError, NotADirectoryError)
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_LINKS_HELP = (
    "this file system has no hard links, so nothing on it can be created exactly once; "
    "use a local disk, NFS, or the bucket itself as gs://BUCKET/PREFIX instead of a gcsfuse mount"
)


class PosixStorage:
    """A run's root directory. Creating the object touches nothing; the first `create` makes the directory. Its own
    later disappearance, or another directory in its place, is RootChanged."""

    def __init__(self, root: str) -> None:
        path = os.path.abspath(os.path.expanduser(root))
        self.root = root_at(path)
        self.url = "file://" + path
        self._opened = False  # whether this process has created something, so that the file system is known to do

    def check_root(self) -> None:
        """Raises RootChanged if the root is not the one that was opened."""
        self.root.check()

    def open(self, key: str) -> int:
        """A descriptor of an object, for the caller to close. Raises OSError, Unavailable."""
        return self.root.open(key)

    def create(self, key: str, body: bytes) -> Created | Exists:
        path = self._path(key)
        try:
            self.root.ready()
            with self.root.directory(TEMPORARY, make=True) as temporaries:
                self._create(temporaries, key, body)
        except FileExistsError:
            return self._compare(key, body)
        except OSError as error:
            raise storage_error("create", path, error) from error
        return Created()

    def _create(self, temporaries: int, key: str, body: bytes) -> None:
        temporary = uuid.uuid4().hex
        try:
            self._write_durably(temporaries, temporary, body)
            if not self._opened:
                _check_links(temporaries, temporary, self.root.path)
                _sweep(temporaries, temporary)
                self._opened = True
            parent = self._link(temporary, key, temporaries)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=temporaries)
        try:
            failpoints.hit("storage.linked")
            os.fsync(parent)
        finally:
            os.close(parent)

    def _write_durably(self, temporaries: int, name: str, body: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = self.root.open_in(temporaries, name, f"{TEMPORARY}/{name}", flags)
        try:
            failpoints.hit("storage.write", half=lambda: os.write(descriptor, body[: len(body) // 2]))
            view = memoryview(body)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _link(self, source: str, key: str, folder: int | None = None) -> int:
        """Give the file at `source` (in `folder`) its name. Returns a descriptor of the directory, for the caller to
        close."""
        directory, _, name = key.rpartition("/")

        def attempt() -> int:
            with self.root.directory(directory, make=True) as parent:
                failpoints.hit("storage.link")
                os.link(source, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
                return os.dup(parent)

        return again_if_pruned(attempt)

    def link(self, source: str, key: str) -> Created | Exists:
        """Give the file at `source`, which must never change, a second name in the run: no byte is copied. Durable once
        `make_durable` has returned. Raises StorageError; a file system cannot link to another one's files."""
        path = self._path(key)
        try:
            self.root.ready()
            try:
                # A link to the file itself, where `source` is a symbolic one.
                os.close(self._link(os.path.realpath(source), key))
            except FileExistsError:
                with self._file(key) as there:
                    return Created() if os.path.samestat(os.fstat(there.fileno()), os.stat(source)) else Exists(b"")
        except OSError as error:
            more = "; the run must be on the same file system" if error.errno == errno.EXDEV else ""
            raise StorageError(f"link {source} to {path}: {reason(error)}{more}") from error
        return Created()

    def copy(
        self, source: str, key: str, on_bytes: Callable[[int], None], pieces: Iterable[bytes | memoryview] | None = None
    ) -> Created | Exists:
        """As `link`, of a file anywhere: its bytes are copied, in pieces. A copy that breaks off has no name. pieces:
        what is in it, where `source` is no file of this host's."""
        path = self._path(key)
        temporary = uuid.uuid4().hex
        try:
            self.root.ready()
            with self.root.directory(TEMPORARY, make=True) as temporaries:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                    with open(
                        self.root.open_in(temporaries, temporary, f"{TEMPORARY}/{temporary}", flags), "wb"
                    ) as copy:
                        for piece in _pieces(source) if pieces is None else pieces:
                            copy.write(piece)
                            on_bytes(len(piece))
                    os.close(self._link(temporary, key, temporaries))
                except FileExistsError:
                    return Exists(b"")
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=temporaries)
        except OSError as error:
            raise storage_error(f"copy {source} to", path, error) from error
        return Created()

    def _compare(self, key: str, body: bytes) -> Created | Exists:
        path = self._path(key)
        folder = key.rpartition("/")[0]
        try:
            there = self._read(key, max(len(body), RECORD_BYTES_MAX))
            if there != body:
                return Exists(there)
            self._sync(folder)
        except OSError as error:
            raise OutcomeUnknown(f"create {path}: exists, but cannot be read back ({reason(error)})") from error
        return Created()

    def refresh(self, key: str) -> None:
        self.root.refresh(key.rpartition("/")[0])

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        try:
            return self._read(key, most_bytes)
        except _MISSING:
            self.root.check()
            return None
        except OSError as error:
            raise storage_error("read", self._path(key), error) from error

    def _read(self, key: str, most_bytes: int) -> bytes:
        with self._file(key) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most_bytes:
                raise TooLarge(f"{self.url}/{key}", size, most_bytes)
            return file.read()

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        try:
            with self._file(key) as file:
                size = os.fstat(file.fileno()).st_size
                if expected_bytes is not None and size != expected_bytes:
                    return FileEntry(path=key, bytes=size, crc32c="")
                # Clean pages only: what is stored, and not what a cache has kept of it.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return _measured(key, file)
        except _MISSING:
            self.root.check()
            return None
        except OSError as error:
            raise storage_error("read", self._path(key), error) from error

    def _file(self, key: str) -> BinaryIO:
        self._path(key)
        return open(self.root.open(key), "rb")

    def pieces(self, key: str) -> Iterator[bytes]:
        """An object of any size, from its beginning. Raises StorageError, for one that is not there, too."""
        try:
            with self._file(key) as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise storage_error("copy", self._path(key), error) from error

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        path = self._path(folder) if folder else self.root.path
        try:
            found = list(self.root.walk(folder, lambda key: key.startswith(prefix) and key >= start, leave=TEMPORARY))
        except _MISSING:
            self.root.check()
            found = []
        except OSError as error:
            raise storage_error("list", path, error) from error
        return iter(sorted(found, key=lambda entry: entry.key))

    def delete(self, key: str) -> bool:
        """As the port says; and of a file whose name no object can have, too, as `list` gives it: a name is only a name
        in its own directory. Raises Unavailable for a link or a special file: it stays."""
        try:
            self.root.check()
            self.root.remove(key)
        except _MISSING:
            return False
        except OSError as error:
            raise storage_error("delete", self.root.shown(key), error) from error
        self.root.prune(key.rpartition("/")[0])
        return True

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        listed, counted = list(keys), known or {}
        for key in listed:
            self._path(key)
        self.root.check()
        directories = _above({key.rpartition("/")[0] for key in listed})
        files = [partial(self._make_durable, key, counted.get(key)) for key in listed]
        folders = [partial(self._sync_named, directory) for directory in directories]
        # Durable is what is named when all are done.
        little = all(key in counted for key in listed) and sum(one.bytes for one in counted.values()) <= _LITTLE_BYTES
        results = _all_of([*files, *folders], one_by_one=little)
        return tuple(one for one in results if one is not None)

    def _make_durable(self, key: str, known: FileEntry | None) -> FileEntry:
        try:
            with self._file(key) as file:
                failpoints.hit("storage.sync")
                # Linux reports a failed write-back to the first fsync after it, also on a descriptor opened since.
                os.fsync(file.fileno())
                if known is not None:
                    return checked_size(self.url, key, os.fstat(file.fileno()).st_size, known)
                return _measured(key, file)
        except OSError as error:
            raise storage_error("sync", self._path(key), error) from error

    def _sync_named(self, folder: str) -> None:
        try:
            self._sync(folder)
        except OSError as error:
            raise storage_error("sync", self.root.shown(folder), error) from error

    def _sync(self, folder: str) -> None:
        with self.root.directory(folder) as directory:
            os.fsync(directory)

    def _path(self, key: str) -> str:
        return self.root.shown(check_key(key, self.url))


def _all_of(calls: Sequence[Callable[[], FileEntry | None]], *, one_by_one: bool) -> list[FileEntry | None]:
    """What the calls return, in order. All at once: file systems with a journal commit once for many. `one_by_one`: on
    this thread, until one takes long: beside a busy interpreter a thread costs more than a quick sync."""
    done: list[FileEntry | None] = []
    while one_by_one and len(done) < len(calls):
        began_s = time.monotonic()
        done.append(calls[len(done)]())
        one_by_one = time.monotonic() - began_s <= _QUICK_S
    if len(done) < len(calls):
        with ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync") as pool:
            done += pool.map(lambda call: call(), calls[len(done) :])
    return done


def _pieces(source: str) -> Iterator[bytes]:
    with open(source, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _above(folders: set[str]) -> list[str]:
    """Directories and those above them up to the root, each once: a name is durable only when they are."""
    found = set(folders)
    for folder in folders:
        while folder:
            folder = folder.rpartition("/")[0]
            found.add(folder)
    return sorted(found, reverse=True)


def _sweep(temporaries: int, fresh: str) -> None:
    """Once per process: remove what crashes have left in `.tmp`, an hour or more older than `fresh` (by the file
    system's own clock). Should its writer live after all, its link fails, and it is told so."""
    with contextlib.suppress(OSError):  # never in the way of a create; the next process tries again
        stale_before = os.stat(fresh, dir_fd=temporaries).st_mtime - _STALE_S
        with os.scandir(temporaries) as entries:
            for item in entries:
                if item.is_file(follow_symlinks=False) and item.stat(follow_symlinks=False).st_mtime < stale_before:
                    os.unlink(item.name, dir_fd=temporaries)


def _measured(key: str, file: BinaryIO) -> FileEntry:
    """Size and checksums of an open file, read a piece at a time."""
    checksum = size = 0
    other = ""
    while chunk := file.read(SMALL_FILE_BYTES):
        checksum = crc32c.crc32c(chunk, checksum)
        size += len(chunk)
        other = crc32(chunk) if size == len(chunk) else ""
    return FileEntry(path=key, bytes=size, crc32c=f"{checksum:08x}", crc32=other)


def _check_links(temporaries: int, temporary: str, root: str) -> None:
    """Once per process, before anything is created: a create is atomic only where hard links are. gcsfuse and some
    network mounts reject them; others copy the file, which lets two writers win. Raises StorageError."""
    second = temporary + ".link"
    inside = {"src_dir_fd": temporaries, "dst_dir_fd": temporaries}
    link = partial(os.link, temporary, second, **inside, follow_symlinks=False)
    try:
        try:
            link()
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StorageError(f"{root}: {reason(error)}: {_NO_LINKS_HELP}") from error
        same = _inode(temporaries, temporary) == _inode(temporaries, second)
        try:
            link()
        except FileExistsError:
            rejected = True
        else:
            rejected = False
        if not (same and rejected):
            raise StorageError(f"{root}: a hard link here is not one file with two names: {_NO_LINKS_HELP}")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(second, dir_fd=temporaries)


def _inode(folder: int, name: str) -> tuple[int, int] | None:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino

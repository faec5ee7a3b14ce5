"""Storage in a directory of a POSIX file system (local disk, or a shared one with hard links and fsync).

An object is written to a temporary file in `<root>/.tmp`, fsynced, hard-linked to its key (link fails if the key is
taken, on every host at once) and its directory fsynced. No rename, so nothing is ever replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import crc32c

from orchestrator import failpoints
from orchestrator.errors import OutcomeUnknown, StorageError
from orchestrator.layout import check_key
from orchestrator.records import SMALL_FILE_BYTES, FileEntry, crc32
from orchestrator.storage.base import Created, Entry, Exists, checked_size

_TMP = ".tmp"
_SEAL_THREADS = 8
_PRUNED_TRIES = 100
_STALE_S = 3600.0
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_NO_LINKS_HELP = (
    "this file system has no hard links, so nothing on it can be created exactly once; "
    "use a local disk, NFS, or the bucket itself as gs://BUCKET/PREFIX instead of a gcsfuse mount"
)


class PosixStorage:
    """A run's root directory. Creating the object touches nothing; the first `create` makes the directory."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        self.url = "file://" + self.root
        self._opened = False  # whether this process has created something, so that the file system is known to do

    def create(self, key: str, body: bytes) -> Created | Exists:
        path = self._path(key)
        temporary = os.path.join(self.root, _TMP, uuid.uuid4().hex)
        try:
            _make_directory(os.path.dirname(temporary))
            _write_durably(temporary, body)
            if not self._opened:
                _check_links(temporary, self.root)
                self._sweep(temporary)
                self._opened = True
            try:
                _link(temporary, path)
            finally:
                os.unlink(temporary)
            failpoints.hit("storage.linked")
            _sync_directory(os.path.dirname(path))
        except FileExistsError:
            return self._compare(path, body)
        except (OSError, StorageError) as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, StorageError):
                raise
            raise storage_error("create", path, error) from error
        return Created()

    def link(self, source: str, key: str) -> Created | Exists:
        """Give the file at `source`, which must never change, a second name in the run: no byte is copied. Durable once
        sealed. Raises StorageError; a file system cannot link to another one's files."""
        path = self._path(key)
        try:
            _link(source, path)
        except FileExistsError:
            return Created() if os.path.samefile(source, path) else Exists(b"")
        except OSError as error:
            more = "; the run must be on the same file system" if error.errno == errno.EXDEV else ""
            raise StorageError(f"link {source} to {path}: {_reason(error)}{more}") from error
        return Created()

    def _sweep(self, fresh: str) -> None:
        """Once per process: remove what crashes have left in `.tmp`, an hour or more older than `fresh` (by the file
        system's own clock). Should its writer live after all, its link fails, and it is told so."""
        with contextlib.suppress(OSError):  # never in the way of a create; the next process tries again
            stale_before = os.stat(fresh).st_mtime - _STALE_S
            with os.scandir(os.path.dirname(fresh)) as entries:
                for item in entries:
                    if item.stat(follow_symlinks=False).st_mtime < stale_before:
                        os.unlink(item.path)

    def _compare(self, path: str, body: bytes) -> Created | Exists:
        try:
            with open(path, "rb") as file:
                there = file.read()
            if there != body:
                return Exists(there)
            _sync_directory(os.path.dirname(path))
        except OSError as error:
            raise OutcomeUnknown(f"create {path}: exists, but cannot be read back ({_reason(error)})") from error
        return Created()

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error("read", path, error) from error

    def measure(self, key: str) -> FileEntry | None:
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                # Clean pages only: what is stored, and not what a cache has kept of it.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return _measured(key, file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error("read", path, error) from error

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        folder = prefix.rpartition("/")[0]
        base = self._path(folder) if folder else self.root
        found = self._walk(base, folder, lambda key: key.startswith(prefix) and key >= start)
        return iter(sorted(found, key=lambda entry: entry.key))

    def _walk(self, directory: str, prefix: str, wanted: Callable[[str], bool]) -> Iterator[Entry]:
        try:
            with os.scandir(directory) as entries:
                for item in entries:
                    key = f"{prefix}/{item.name}" if prefix else item.name
                    if item.is_dir(follow_symlinks=False):
                        if key != _TMP:
                            yield from self._walk(item.path, key, wanted)
                    elif wanted(key) and item.is_file(follow_symlinks=False):  # before stat: a journal is long
                        with contextlib.suppress(FileNotFoundError):  # deleted since: not listed
                            yield Entry(key, item.stat(follow_symlinks=False).st_size)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise storage_error("list", directory, error) from error

    def delete(self, key: str) -> bool:
        path = self._path(key)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise storage_error("delete", path, error) from error
        self._prune(os.path.dirname(path))
        return True

    def _prune(self, directory: str) -> None:
        """Remove directories that a delete has emptied, up to the root's own children."""
        while os.path.dirname(directory) != self.root and directory != self.root:
            try:
                os.rmdir(directory)
            except OSError:  # not empty, or somebody was faster: both are fine
                return
            directory = os.path.dirname(directory)

    def seal(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        wanted, told = list(keys), known or {}
        directories = self._above({os.path.dirname(self._path(key)) for key in wanted})
        # All at once: file systems with a journal commit once for many. Durable is what is named when all are done.
        with ThreadPoolExecutor(_SEAL_THREADS, thread_name_prefix="seal") as pool:
            sealing = [pool.submit(self._seal_file, key, told.get(key)) for key in wanted]
            syncing = [pool.submit(self._sync_named, directory) for directory in directories]
            sealed = tuple(future.result() for future in sealing)
            for future in syncing:
                future.result()
        return sealed

    def _seal_file(self, key: str, known: FileEntry | None) -> FileEntry:
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                failpoints.hit("storage.sync")
                # Linux reports a failed write-back to the first fsync after it, also on a descriptor opened since.
                os.fsync(file.fileno())
                if known is not None:
                    return checked_size(self.url, key, os.fstat(file.fileno()).st_size, known)
                return _measured(key, file)
        except OSError as error:
            raise storage_error("sync", path, error) from error

    def _above(self, directories: set[str]) -> Iterable[str]:
        """Directories and their parents up to the root, each once: a name is durable only when they are."""
        found = set(directories)
        for directory in directories:
            while directory != self.root:
                directory = os.path.dirname(directory)
                found.add(directory)
        return sorted(found, reverse=True)

    def _sync_named(self, directory: str) -> None:
        try:
            _sync_directory(directory)
        except OSError as error:
            raise storage_error("sync", directory, error) from error

    def _path(self, key: str) -> str:
        return os.path.join(self.root, check_key(key, self.url))


def _measured(key: str, file: BinaryIO) -> FileEntry:
    """Size and checksums of an open file, read a piece at a time."""
    checksum = size = 0
    other = ""
    while chunk := file.read(SMALL_FILE_BYTES):
        checksum = crc32c.crc32c(chunk, checksum)
        size += len(chunk)
        other = crc32(chunk) if size == len(chunk) else ""
    return FileEntry(path=key, bytes=size, crc32c=f"{checksum:08x}", crc32=other)


def _make_directory(path: str) -> None:
    """Create `path` and its parents durably: each new directory's parent is fsynced."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync_directory(parent)


def _link(temporary: str, path: str) -> None:
    """Give the file its name, in a directory that a delete elsewhere may be pruning at this very moment."""
    for tries_left in reversed(range(_PRUNED_TRIES)):
        try:
            _make_directory(os.path.dirname(path))
            failpoints.hit("storage.link")
            os.link(temporary, path)
            return
        except FileNotFoundError:
            if not tries_left:
                raise


def _check_links(temporary: str, root: str) -> None:
    """Once per process, before anything is created: a create is atomic only where hard links are. gcsfuse and some
    network mounts refuse them; others copy the file, which lets two writers win. Raises StorageError."""
    second = temporary + ".link"
    try:
        try:
            os.link(temporary, second)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StorageError(f"{root}: {_reason(error)}: {_NO_LINKS_HELP}") from error
        same = os.path.exists(second) and os.path.samefile(temporary, second)
        try:
            os.link(temporary, second)
        except FileExistsError:
            refused = True
        else:
            refused = False
        if not (same and refused):
            raise StorageError(f"{root}: a hard link here is not one file with two names: {_NO_LINKS_HELP}")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(second)


def _write_durably(path: str, body: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        failpoints.hit("storage.write", half=lambda: os.write(descriptor, body[: len(body) // 2]))
        view = memoryview(body)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(what: str, path: str, error: OSError) -> StorageError:
    """A system call's failure as all of ours are told."""
    return StorageError(f"{what} {path}: {_reason(error)}")


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "error")
    return f"{name} ({error.strerror or error})"

"""The wall around a run: everything on a file system is reached from a descriptor of the root, and never outside it.

A path says where something was when it was looked up; a descriptor is the thing itself. So the root is opened once (it
may be a symbolic link, its owner chose it), and what is below it is opened from there, one component at a time, without
following links: nothing that somebody swaps between a look and its use leads elsewhere. Only regular files are opened,
and opening never waits for the other end of a pipe.

A root that this process has seen is not made again: when its path leads elsewhere (renamed, linked to something else,
deleted, unmounted), writing is rejected with RootChanged, and for as long as that directory exists somewhere also to
whoever opens the path again in this process: a loop that tries again must not begin a new run beside the old one.

What TensorStore is to read it opens by path itself: `inspect` looks at all of it before, which holds off accidents,
though not somebody who swaps files at the right moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator

from orchestrator.errors import RootChanged, StorageError, Unavailable, UnsafeKey, UsageError
from orchestrator.rules.keys import check_key, journal_version
from orchestrator.storage.port import Entry

DEPTH_MAX = 32  # directories below each other: so many descriptors does a listing hold
_PRUNED_TRIES = 100
_LOST_MAX = 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
# What a network file system answers when its server, and not the file, has a problem.
_NO_ANSWER = frozenset({errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN, errno.EIO, errno.ENODEV})


class Root:
    """One directory and what is below it, by `/`-separated keys ('' is the directory itself). Any thread.

    Methods raise OSError as the system calls do, with ENOENT or ENOTDIR for what is not there; Unavailable for links
    and special files, naming path and kind; RootChanged.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        self._identity: tuple[int, int] | None = None  # device and inode
        self._lock = threading.Lock()

    def shown(self, key: str) -> str:
        return f"{self.path}/{key}" if key else self.path

    def check(self) -> None:
        """Nothing, if the path leads to the directory that this process has opened, or none was opened yet. Raises
        RootChanged if it does not, Unavailable if that cannot be found out."""
        if now := self._elsewhere():
            known = _lost.get(self.path)
            if known is None or not known.exists:  # what was opened in the place of one that is lost is not lost
                _lost[self.path] = self
            while len(_lost) > _LOST_MAX:  # they hold descriptors
                _lost.pop(next(iter(_lost)), None)
            raise RootChanged(
                f"{self.path}: {now}; it was renamed, linked to something else, deleted or unmounted while this "
                "process used it. Nothing is written any more: put it back, or start a process with the right directory"
            )

    def _elsewhere(self) -> str:
        """What is at the path instead of the directory that was opened; '' if that is. Raises Unavailable."""
        if self._identity is None:
            return ""
        try:
            status = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return "nothing is there any more"
        except OSError as error:
            raise Unavailable(f"{self.path}: cannot be looked at: {reason(error)}") from error
        same = (status.st_dev, status.st_ino) == self._identity
        return "" if same else "another directory is there now"

    @property
    def current(self) -> bool:
        """Whether this is (still) what is found at the path."""
        try:
            return not self._elsewhere()
        except StorageError:
            return True  # for all we know

    @property
    def exists(self) -> bool:
        """Whether the directory is still there, wherever that is; True if nobody can tell."""
        try:
            return self._identity is None or os.fstat(self._descriptor).st_nlink > 0
        except OSError:
            return True

    def ready(self) -> None:
        """The root is there, and the one that it was: before anything is written. It is made (durably, with the
        directories above) if this process has never seen it."""
        lost = _lost.get(self.path)
        if lost is not None and lost.exists:
            lost.check()
        if self._identity is None:
            try:
                self.descriptor()
            except FileNotFoundError:
                _make(self.path)
                self.descriptor()
        self.check()

    def descriptor(self) -> int:
        """The root's own, opened at the first use and kept as long as this object. Raises OSError."""
        if self._identity is None:
            with self._lock:
                if self._identity is None:
                    descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    status = os.fstat(descriptor)
                    # Not when Python exits: a thread that still runs would find another file under the number.
                    weakref.finalize(self, os.close, descriptor).atexit = False
                    self._descriptor, self._identity = descriptor, (status.st_dev, status.st_ino)
        return self._descriptor

    def refresh(self, key: str) -> None:
        """Open all directories from `/` down to the one at `key`. A client of NFS believes for half a minute and longer
        that what it has not found is not there; but when a directory is opened it asks the server whether it has
        changed (nfs(5), close-to-open consistency), and then looks up its names again. Never raises."""
        with contextlib.suppress(OSError, StorageError):
            above = ""
            for name in self.path.split("/"):
                above = f"{above}{name}/"
                os.close(os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            below = ""
            for name in ("", *key.split("/")):
                below = f"{below}/{name}".strip("/")
                with self.directory(below) as descriptor:
                    os.close(os.open(".", _DIRECTORY, dir_fd=descriptor))

    @contextlib.contextmanager
    def directory(self, key: str, make: bool = False, durable: bool = True) -> Iterator[int]:
        """A descriptor of the directory at `key`, open within the context. `make`: what is missing of it is made (the
        root itself is not), and if it is to be `durable`, each new directory's parent is fsynced."""
        root = current = self.descriptor()
        try:
            done = ""
            for name in key.split("/") if key else ():
                _component(name, key, self.path)
                done = f"{done}/{name}" if done else name
                following = self._step(current, name, done, make, durable)
                if current != root:
                    os.close(current)
                current = following
            yield current
        finally:
            if current != root:
                os.close(current)

    def _step(self, parent: int, name: str, key: str, make: bool, durable: bool) -> int:
        try:
            return os.open(name, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
        except OSError as error:
            if _kind_at(parent, name) == "a symbolic link":
                raise self.rejection(key, "a symbolic link", "a directory") from error
            raise
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=parent)
        if durable:
            os.fsync(parent)
        return os.open(name, _DIRECTORY, dir_fd=parent)

    def open(self, key: str) -> int:
        """A descriptor of the regular file at `key`, for reading, for the caller to close."""
        folder, _, name = key.rpartition("/")
        with self.directory(folder) as parent:
            return self.open_in(parent, name, key, os.O_RDONLY)

    def create(self, key: str) -> int:
        """A descriptor of a new file at `key`, for writing, for the caller to close. Its directories are made, and
        become durable with the file."""
        folder, _, name = key.rpartition("/")

        def attempt() -> int:
            with self.directory(folder, make=True, durable=False) as parent:
                return self.open_in(parent, name, key, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

        return again_if_pruned(attempt)

    def open_in(self, parent: int, name: str, key: str, flags: int) -> int:
        """As `open`, of `name` in the directory that `parent` is a descriptor of. `flags`: of open(2)."""
        _component(name, key, self.path)
        # Not even opened, if it can be helped: opening a device does things. What is swapped in after this look does
        # not block, and is found out below.
        self._check_regular(key, _kind_at(parent, name))
        descriptor = os.open(name, flags | _FILE, 0o666, dir_fd=parent)
        try:
            self._check_regular(key, _kind(os.fstat(descriptor).st_mode))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_regular(self, key: str, kind: str) -> None:
        if kind:
            raise self.rejection(key, kind, "a regular file")

    def rejection(self, key: str, kind: str, expected: str) -> Unavailable:
        if kind == "a symbolic link":
            then = "nothing below a run's root may be one: move what it points to back to its place"
        else:
            then = f"expected {expected}; find out who put it there, and take it away"
        return Unavailable(f"{self.shown(key)}: is {kind}; {then}")

    def remove(self, key: str) -> None:
        """Unlink the regular file at `key`, whatever its name. Links and special files stay, and are Unavailable: they
        are not ours."""
        folder, _, name = key.rpartition("/")
        _component(name, key, self.path)
        with self.directory(folder) as parent:
            self._check_regular(key, _kind(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode))
            os.unlink(name, dir_fd=parent)  # of the name itself, and never of what it points to

    def prune(self, key: str) -> None:
        """Remove the directory at `key` and those above it, as far as they are empty, up to the root's own children."""
        while "/" in key:
            folder, _, name = key.rpartition("/")
            try:
                with self.directory(folder) as parent:
                    os.rmdir(name, dir_fd=parent)
            except (OSError, StorageError):  # not empty, or somebody was faster: both are fine
                return
            key = folder

    def walk(self, folder: str, wanted: Callable[[str], bool], leave: str = "") -> Iterator[Entry]:
        """What is below the directory at `folder`, in no order, as far as `wanted` says of its key. Links are not
        followed. `leave`: the key of a directory that is not looked into."""
        with self.directory(folder) as parent:
            yield from self._walk(parent, folder, wanted, leave, DEPTH_MAX)

    def _walk(self, parent: int, folder: str, wanted: Callable[[str], bool], leave: str, depth: int) -> Iterator[Entry]:
        # Opened again: whoever shares a descriptor also shares where it stands in the directory.
        own = os.open(".", _DIRECTORY, dir_fd=parent)
        try:
            with os.scandir(own) as entries:
                for item in entries:
                    key = f"{folder}/{item.name}" if folder else item.name
                    if item.is_dir(follow_symlinks=False):
                        if key != leave:
                            yield from self._walk_into(own, item.name, key, wanted, leave, depth)
                    elif wanted(key):  # before stat: a journal is long
                        with contextlib.suppress(FileNotFoundError):  # deleted since: not listed
                            yield _entry(key, item)
        finally:
            os.close(own)

    def _walk_into(
        self, parent: int, name: str, key: str, wanted: Callable[[str], bool], leave: str, depth: int
    ) -> Iterator[Entry]:
        if journal_version(key) is not None and wanted(key):
            yield Entry(key, 0, "is a directory")  # where an entry is or will be: not to be overlooked
        problem = ""
        if not depth:
            problem = f"is a directory below {DEPTH_MAX} others; it is not looked into"
        else:
            try:
                below = os.open(name, _DIRECTORY, dir_fd=parent)
            except FileNotFoundError:  # deleted since
                return
            except OSError as error:
                problem = f"cannot be listed: {reason(error)}"
        if problem:
            if wanted(key):
                yield Entry(key, 0, problem)
            return
        try:
            yield from self._walk(below, key, wanted, leave, depth - 1)
        finally:
            os.close(below)

    def inspect(self, key: str) -> None:
        """Nothing, if all that is below `key` are directories and regular files. Raises Unavailable naming what is not:
        for what is to be read by path, by others."""
        for entry in self.walk(key, lambda found: True):
            if entry.problem:
                raise Unavailable(f"{self.shown(entry.key)}: {entry.problem}; move it away, or back to its place")


def again_if_pruned(attempt: Callable[[], int]) -> int:
    """`attempt`'s result. It makes something in a directory that a delete elsewhere may be removing at this very
    moment: what is not there then is tried again."""
    for _ in range(_PRUNED_TRIES - 1):
        with contextlib.suppress(FileNotFoundError):
            return attempt()
    return attempt()


_lost: dict[str, Root] = {}  # by path: those that were not found there any more when they were used
_roots: weakref.WeakValueDictionary[str, Root] = weakref.WeakValueDictionary()
_registering = threading.Lock()


def root_at(path: str) -> Root:
    """The root at an absolute path, the same one for the whole process while it is used. One that is not found there
    any more is left to those who have it."""
    with _registering:
        found = _roots.get(path)
    if found is not None and found.current:  # asked without the lock: a file system may hang
        return found
    with _registering:
        made = _roots[path] = Root(path)
    return made


def find(path: str) -> tuple[Root, str]:
    """The root that is in use above `path`, and the key of `path` in it; a root of its own if there is none."""
    whole = above = path.rstrip("/") or "/"
    with _registering:
        while above:
            found = _roots.get(above)
            if found is not None:
                return found, whole[len(above) :].lstrip("/")
            above = above.rpartition("/")[0]
    return root_at(whole), ""


_aliased: dict[str, Root] = {}  # keeps their descriptors open


def alias(path: str) -> str:
    """Another path to the directory at `path`, for a library that takes a backslash for a slash. Raises UsageError
    where the system has none."""
    root, key = find(path)
    try:
        other = f"/proc/self/fd/{root.descriptor()}/{key}".rstrip("/") + "/"
    except OSError as error:
        raise storage_error("read", path, error) from error
    _aliased[root.path] = root
    if "\\" in other or not os.path.isdir("/proc/self/fd"):
        raise UsageError(f"{path}: TensorStore cannot open a path with a backslash in it here; rename the directory")
    return other


def storage_error(what: str, path: str, error: OSError) -> StorageError:
    """A system call's failure as all of ours are reported. Nothing that cannot be read is thought to be damaged."""
    reading = what in ("read", "list") and error.errno != errno.ENAMETOOLONG  # then the name is wrong
    kind = Unavailable if reading or error.errno in _NO_ANSWER else StorageError
    return kind(f"{what} {path}: {reason(error)}")


def reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "error")
    return f"{name} ({error.strerror or error})"


def _component(name: str, key: str, where: str) -> None:
    """Names are passed on as they are, so only these could lead elsewhere. Raises UnsafeKey."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UnsafeKey(
            f"{where}: key {key!r} is not a plain relative path; the record is damaged or hostile, not used"
        )


def _entry(key: str, item: os.DirEntry[str]) -> Entry:
    if item.is_file(follow_symlinks=False):
        return Entry(key, item.stat(follow_symlinks=False).st_size, _name_problem(key))
    return Entry(key, 0, f"is {_kind(item.stat(follow_symlinks=False).st_mode) or 'no regular file'}")


def _name_problem(key: str) -> str:
    try:
        check_key(key, "")
    except UnsafeKey:
        return "has a name that no object of a run can have"
    return ""


def _kind(mode: int) -> str:
    """What a file is in words; '' for a regular one."""
    return next((kind for test, kind in _KINDS if test(mode)), "" if stat.S_ISREG(mode) else "no regular file")


def _kind_at(parent: int, name: str) -> str:
    """'' for a regular file, and where nothing is."""
    try:
        return _kind(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return ""


def _make(path: str) -> None:
    """Create a directory and those above it durably: each new directory's parent is fsynced."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    sync(parent)


def sync(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

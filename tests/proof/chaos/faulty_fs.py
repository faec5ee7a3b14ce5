"""A FUSE file system that passes everything on to a directory, and fails when it is told to.

python -m tests.proof.chaos.faulty_fs BACKING MOUNT CONTROL

While the file CONTROL holds `OPERATION ERROR N` (say `write EIO 5`), every Nth call of that operation fails with ERROR.
Needs fusepy and libfuse 2 (`pip install '.[chaos]'` in a checkout, `apt install libfuse2`).
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuse


class Faulty(fuse.Operations):  # type: ignore[misc]  # fusepy is untyped
    """Operations as fusepy calls them, on any of its threads; paths begin with `/`."""

    def __init__(self, backing: str, control: str) -> None:
        self._backing, self._control = backing, Path(control)
        self._lock, self._calls = threading.Lock(), 0

    def __call__(self, operation: str, path: str, *arguments: Any) -> Any:
        self._maybe_fail(operation)
        return super().__call__(operation, self._backing + path, *arguments)

    def _maybe_fail(self, operation: str) -> None:
        try:
            wanted, error, every = self._control.read_text().split()
        except (OSError, ValueError):
            return
        if wanted == operation:
            with self._lock:
                self._calls += 1
                if self._calls % int(every) == 0:
                    raise fuse.FuseOSError(getattr(errno, error))

    def getattr(self, path: str, handle: int | None = None) -> dict[str, Any]:
        found = os.lstat(path)
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime", "st_mtime", "st_ctime", "st_ino")
        return {name: getattr(found, name) for name in names}

    def readdir(self, path: str, handle: int) -> Iterator[str]:
        return iter([".", "..", *os.listdir(path)])

    def statfs(self, path: str) -> dict[str, Any]:
        found = os.statvfs(path)
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(found, name) for name in names}

    def open(self, path: str, flags: int) -> int:
        return os.open(path, flags)

    def create(self, path: str, mode: int, info: Any = None) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
        return os.pread(handle, size, offset)

    def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
        return os.pwrite(handle, data, offset)

    def fsync(self, path: str, only_data: int, handle: int) -> None:
        os.fsync(handle)

    def fsyncdir(self, path: str, only_data: int, handle: int) -> None:
        return None

    def release(self, path: str, handle: int) -> None:
        os.close(handle)

    def truncate(self, path: str, length: int, handle: int | None = None) -> None:
        os.truncate(path, length)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, self._backing + new)

    def link(self, new: str, old: str) -> None:
        os.link(self._backing + old, new)


if __name__ == "__main__":
    backing, mount, control = sys.argv[1:4]
    fuse.FUSE(Faulty(backing, control), mount, foreground=True, use_ino=True, attr_timeout=0, entry_timeout=0)

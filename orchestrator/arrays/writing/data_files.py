"""Where a process's chunks go: the data files of its own store, written in order, with size and CRC-32C of each.

On a file system the chunks go straight from the arrays to the file, and the kernel is told to begin writing back at
once, so that the disk works while the next chunk's checksum is computed; `Storage.make_durable` syncs the files later.
In an object store a data file is one object, durable when the write has returned.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import crc32c

from orchestrator.arrays.format.tensorstore_specs import shared_context
from orchestrator.rules import zarr_chunks
from orchestrator.rules.records import FileEntry, crc32
from orchestrator.storage import directory, local_path, overlap
from orchestrator.storage.directory import storage_error
from orchestrator.storage.overlap import Begun

Buffer = bytes | memoryview

_WRITE_BACK_BYTES = 8 << 20
_WRITE_BACK_BYTES_MIN = 1 << 20  # for less, a sync is as quick
_SYNC_FILE_RANGE_WRITE = 2


class DataFile(Protocol):
    """One file being written, by one thread. `path`: relative to the store."""

    path: str
    bytes: int
    crc32c: int
    crc32: str  # as in FileEntry; '' if the file was written in parts

    def append(self, parts: Sequence[Buffer], checksum: int) -> int:
        """Write `parts`, whose bytes together have CRC-32C `checksum`. Returns the offset of the first."""

    def begin_close(self) -> None:
        """Everything has been appended: start the upload to an object store, without waiting for it."""

    def close(self, *, whole: bool = True) -> None:
        """All of it has been handed to the file system, or is in the object store. Not `whole`: give the file up."""


def opener(url: str) -> Callable[[str], DataFile]:
    """Returns what makes a file below the directory at `url`, given its relative path. Makes missing directories."""
    base = url.rstrip("/")
    path = local_path(base)
    if path is not None:
        return functools.partial(_LocalFile, *directory.find(path))
    return functools.partial(_BucketObject, base)


def write_files(opened: Callable[[str], DataFile], bodies: Mapping[str, bytes]) -> dict[str, DataFile]:
    """A few whole small files, by path: in an object store all are written at the same time."""
    files = {}
    for path, body in bodies.items():
        file = files[path] = opened(path)
        try:
            file.append([body], crc32c.crc32c(body))
        except BaseException:
            file.close(whole=False)
            raise
        file.crc32 = crc32(body)
        file.begin_close()
    for file in files.values():
        file.close()
    return files


def entry(path: str, file: DataFile) -> FileEntry:
    """`file` as the manifest lists it, under `path`."""
    return FileEntry(path=path, bytes=file.bytes, crc32c=f"{file.crc32c:08x}", crc32=file.crc32)


def data_file_path() -> str:
    return f"d/{uuid.uuid4().hex}"


class _LocalFile:
    """A file of the store that is at key `base` below `root`."""

    def __init__(self, root: directory.Root, base: str, path: str) -> None:
        self.path, self.bytes, self.crc32c, self.crc32 = path, 0, 0, ""
        key = f"{base}/{path}" if base else path
        self._full = root.shown(key)
        try:
            root.ready()  # no data goes to a root that was moved or replaced
            self._descriptor = root.create(key)
        except OSError as error:
            raise storage_error("create", self._full, error) from error
        self._handed_over = 0

    def append(self, parts: Sequence[Buffer], checksum: int) -> int:
        offset = self.bytes
        size = sum(len(part) for part in parts)
        try:
            written = os.writev(self._descriptor, parts)
            while written < size:  # a signal or a full disk: the next call says which
                written += os.write(self._descriptor, b"".join(parts)[written:])
        except OSError as error:
            raise storage_error("write", self._full, error) from error
        self.bytes += size
        self.crc32c = zarr_chunks.combined_crc32c(self.crc32c, checksum, size)
        if self.bytes - self._handed_over >= _WRITE_BACK_BYTES:
            self._begin_write_back()
        return offset

    def _begin_write_back(self) -> None:
        """Best effort: without it, the disk would start only when the file is made durable."""
        call = _sync_file_range()
        if call is not None:
            call(self._descriptor, self._handed_over, self.bytes - self._handed_over, _SYNC_FILE_RANGE_WRITE)
        self._handed_over = self.bytes

    def begin_close(self) -> None:
        self.close()

    def close(self, *, whole: bool = True) -> None:
        if self._descriptor < 0:
            return
        if whole and self.bytes - self._handed_over >= _WRITE_BACK_BYTES_MIN:
            self._begin_write_back()
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


@functools.cache
def _sync_file_range() -> Any:
    """Linux's sync_file_range(2), which Python does not have; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


class _BucketObject:
    """One object in a bucket, uploaded in one request when it is closed."""

    def __init__(self, base: str, path: str) -> None:
        self.path, self.bytes, self.crc32c, self.crc32 = path, 0, 0, ""
        self._base = base
        self._parts: list[bytes] = []
        self._writing: Begun[None] | None = None

    def append(self, parts: Sequence[Buffer], checksum: int) -> int:
        offset = self.bytes
        self._parts.append(b"".join(parts))
        self.bytes += len(self._parts[-1])
        self.crc32c = zarr_chunks.combined_crc32c(self.crc32c, checksum, self.bytes - offset)
        return offset

    def begin_close(self) -> None:
        self._writing = overlap.begin(self._write)

    def close(self, *, whole: bool = True) -> None:
        if not whole:
            self._parts.clear()
            return
        if self._writing is not None:
            self._writing.result()
        else:
            self._write()

    def _write(self) -> None:
        from orchestrator.arrays.format import buckets

        body, self._parts = b"".join(self._parts), []
        buckets.write(self._base, self.path, body, shared_context())

"""The merged OCDBT store of a directory on a file system, read without TensorStore."""

from __future__ import annotations

import errno
import os
import threading

import crc32c

from orchestrator import chunks
from orchestrator.arrays import ocdbt
from orchestrator.contents import Chunk, Place
from orchestrator.errors import Damaged, OrchestratorError, StorageError, Unavailable
from orchestrator.layout import check_key
from orchestrator.storage.directory import find

_MANIFEST_BYTES_MAX = 64 << 20
_PIECE_BYTES = 256 << 10  # read, and checked while it is in the cache


# What is gone, or what the disk itself cannot give back. Anything else (no permission, no descriptors left, a server
# that does not answer) says nothing about the data.
_LOST = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN})


def _fault(error: OSError) -> type[OrchestratorError]:
    return Damaged if error.errno in _LOST else StorageError


class LocalStore:
    """Files stay open until `close`. Any thread."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._root, self._base = find(directory)
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def places(self) -> dict[str, Chunk] | None:
        """Where each value is; None if the store's tree is one that only TensorStore reads. Raises Damaged."""
        where = f"{self._directory}/{ocdbt.MANIFEST}"
        try:
            root = ocdbt.decode_manifest(self._whole(ocdbt.MANIFEST, where), where)
            found: dict[str, Chunk] = {}
            nodes = [(b"", root)] if root else []
            while nodes:
                prefix, node = nodes.pop()
                path, _, size = node.place
                body = bytearray(size)
                self._read(memoryview(body), node.place, "the tree")
                entries, children = ocdbt.decode_node(bytes(body), node.transitive, prefix, f"{self._directory}/{path}")
                found |= {key.decode(): value for key, value in entries}
                nodes += children
        except ocdbt.Unsupported:
            return None
        except OSError as error:
            raise _fault(error)(f"{where}: cannot be read: {error}") from error
        return found

    def read_into(
        self, target: memoryview, place: Place, label: str, tail: memoryview | None = None
    ) -> tuple[int, int]:
        """A chunk's elements into `target`; CRC-32C of what was read, and what the chunk says."""
        path, offset, _ = place
        ending = bytearray(chunks.CHECKSUM_BYTES) if tail is None else tail
        checksum = 0
        for first in range(0, len(target), _PIECE_BYTES):
            piece = target[first : first + _PIECE_BYTES]
            self._read(piece, (path, offset + first, len(piece)), label)
            checksum = crc32c.crc32c(piece, checksum)
        self._read(memoryview(ending), (path, offset + len(target), len(ending)), label)
        return checksum, int.from_bytes(ending, "little")

    def _read(self, target: memoryview, place: Place, label: str) -> None:
        path, offset, size = place
        got = 0
        try:
            while got < size and (more := os.preadv(self._descriptor(path), [target[got:]], offset + got)):
                got += more  # some file systems give less than was asked for, before the end
        except OSError as error:
            raise _fault(error)(f"{label}: {self._directory}/{path} cannot be read: {error}") from error
        if got != size:
            raise Damaged(f"{label}: {self._directory}/{path} ends at {offset + got}, wanted {offset + size}")

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            with self._lock:
                if path not in self._open:
                    check_key(path, f"{self._directory}/{ocdbt.MANIFEST}")  # it comes from storage
                    self._open[path] = self._root.open(f"{self._base}/{path}" if self._base else path)
        return self._open[path]

    def _whole(self, path: str, where: str) -> bytes:
        """A small file."""
        size = os.fstat(self._descriptor(path)).st_size
        if size > _MANIFEST_BYTES_MAX:
            raise Unavailable(f"{where}: has {size} bytes, at most {_MANIFEST_BYTES_MAX} were expected; it is not read")
        body = bytearray(size)
        self._read(memoryview(body), (path, 0, size), "the tree")
        return bytes(body)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

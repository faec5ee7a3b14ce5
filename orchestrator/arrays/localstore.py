"""The merged OCDBT store of a directory on a file system, read without TensorStore."""

from __future__ import annotations

import errno
import os
import threading

import crc32c

from orchestrator import chunks
from orchestrator.arrays import ocdbt
from orchestrator.contents import Chunk, Place
from orchestrator.errors import Damaged, OrchestratorError, Suspect, Unavailable
from orchestrator.layout import STATE, check_key
from orchestrator.storage.directory import find

_MANIFEST_BYTES_MAX = 64 << 20
_PIECE_BYTES = 256 << 10  # read, and checked while it is in the cache


# What seems to be gone is looked for again in another way. Anything else (no permission, no descriptors left, a disk or
# a server that does not answer) says nothing about the data.
_LOST = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})


def _fault(text: str, path: str, error: OSError) -> OrchestratorError:
    if error.errno in _LOST:
        return Suspect(text, files=[STATE + path])
    return Unavailable(text)


class LocalStore:
    """Files stay open until `close`. Any thread."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._root, self._base = find(directory)
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._tree: list[str] = []  # files that the tree was read from

    def places(self) -> dict[str, Chunk] | None:
        """Where each value is; None if the store's tree is one that only TensorStore reads. Raises Suspect naming the
        files that it was read from, Unavailable."""
        self._tree = [ocdbt.MANIFEST]
        try:
            return self._read_tree()
        except ocdbt.Unsupported:
            return None
        except Damaged as error:  # once is no proof
            raise Suspect(str(error), files=[STATE + path for path in self._tree]) from error

    def _read_tree(self) -> dict[str, Chunk]:
        where = f"{self._directory}/{ocdbt.MANIFEST}"
        try:
            root = ocdbt.decode_manifest(self._whole(ocdbt.MANIFEST, where), where)
        except OSError as error:
            raise _fault(f"{where}: cannot be read: {error}", ocdbt.MANIFEST, error) from error
        found: dict[str, Chunk] = {}
        nodes = [(b"", root)] if root else []
        while nodes:
            prefix, node = nodes.pop()
            path, _, size = node.place
            self._tree.append(path)
            body = bytearray(size)
            self._read(memoryview(body), node.place, "the tree")
            entries, children = ocdbt.decode_node(bytes(body), node.transitive, prefix, f"{self._directory}/{path}")
            found |= {key.decode(): value for key, value in entries}
            nodes += children
        return found

    def files_of(self, chunk: Chunk | None) -> list[str]:
        """The files, below the directory, that say what this value is: its own, or those of the tree."""
        return [chunk[0]] if isinstance(chunk, tuple) else sorted(set(self._tree))

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
            raise _fault(f"{label}: {self._directory}/{path} cannot be read: {error}", path, error) from error
        if got != size:
            text = f"{label}: {self._directory}/{path} ends at {offset + got}, wanted {offset + size}"
            raise Suspect(text, files=[STATE + path])

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

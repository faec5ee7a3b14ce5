"""The merged OCDBT store of a directory on a file system, read without TensorStore."""

from __future__ import annotations

import errno
import os
import threading

import crc32c

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.arrays.reading.stored_tree import walk
from orchestrator.errors import Damaged, OrchestratorError, Suspect, Unavailable
from orchestrator.rules import zarr_chunks
from orchestrator.rules.chunk_index import Chunk, Location, StoredFiles
from orchestrator.rules.keys import STATE, check_key
from orchestrator.rules.validate import INT64_MAX
from orchestrator.storage.directory import find

_MANIFEST_BYTES_MAX = 64 << 20
PIECE_BYTES = 1 << 20  # read, and checked while it is in the cache; with less, threads wait for Python's lock


# What seems to be gone is searched for again in another way. Anything else (no permission, no descriptors left, a disk
# or a server that does not answer) says nothing about the data.
_LOST = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})


def fault(text: str, path: str, error: OSError) -> OrchestratorError:
    """What `error`, about a file, says of the data."""
    if error.errno in _LOST:
        return Suspect(text, files=[STATE + path])
    return Unavailable(text)


class LocalStore:
    """The store at a path. stored: what the manifest lists there, nothing else is read; None: nobody knows. Chunks may
    be read by any number of threads at a time; their files stay open until `close`."""

    def __init__(self, directory: str, stored: StoredFiles | None = None) -> None:
        self._directory, self._stored = directory.rstrip("/"), stored
        self._root, self._base = find(directory)
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._tree: list[str] = []  # files that the tree was read from

    def index(self) -> StoredIndex | None:
        """Key -> value, or its place; None if the store's tree is one that only TensorStore reads. No file is open
        afterwards. Raises Suspect naming the files that it was read from, Unavailable."""
        self._tree = [ocdbt.MANIFEST]
        try:
            return self._read_tree()
        except ocdbt.Unsupported:
            return None
        except Damaged as error:  # once is no proof
            files = [STATE + path for path in dict.fromkeys(self._tree)]
            raise Suspect(str(error), files=files, structure=True) from error
        finally:
            self.close()

    def _read_tree(self) -> StoredIndex:
        where = f"{self._directory}/{ocdbt.MANIFEST}"
        try:
            root = ocdbt.decode_manifest(self._whole(ocdbt.MANIFEST, where), where)
        except OSError as error:
            raise fault(f"{where}: cannot be read: {error}", ocdbt.MANIFEST, error) from error
        return walk(root, self._node, self._directory, self._stored) if root else StoredIndex(())

    def files_of(self, chunk: Chunk | None) -> list[str]:
        """The files, below the directory, that a value of the index comes from: its own, or those of the tree."""
        return [chunk[0]] if isinstance(chunk, tuple) else sorted(set(self._tree))

    def _node(self, place: Location) -> bytes:
        path, offset, size = place
        self._tree.append(path)
        real = os.fstat(self._descriptor(path)).st_size
        if size > ocdbt.NODE_BYTES_MAX or offset + size > real:
            raise Damaged(f"{self._directory}/{path}: a node of {size} bytes at {offset}; the file has {real}")
        body = bytearray(size)
        self.read(memoryview(body), place, "the tree")
        return bytes(body)

    def read_into(self, elements: memoryview, place: Location, label: str) -> tuple[int, int]:
        """Read a chunk's elements. Returns the CRC-32C of what was read and the one that the chunk ends with. Raises
        Suspect, Unavailable, both beginning with `label`."""
        path, offset, _ = place
        ending = bytearray(zarr_chunks.CHECKSUM_BYTES)
        checksum = 0
        for first in range(0, len(elements), PIECE_BYTES):
            piece = elements[first : first + PIECE_BYTES]
            self.read(piece, (path, offset + first, len(piece)), label)
            checksum = crc32c.crc32c(piece, checksum)
        self.read(memoryview(ending), (path, offset + len(elements), len(ending)), label)
        return checksum, int.from_bytes(ending, "little")

    def read(self, buffer: memoryview, place: Location, label: str) -> None:
        """Read bytes at a place. Raises Suspect, Unavailable, both beginning with `label`."""
        path, offset, size = place
        if offset + size > INT64_MAX:
            raise Damaged(f"{label}: {self._directory}/{path}: {size} bytes at {offset} are in no file")
        done = 0
        try:
            while done < size and (more := os.preadv(self._descriptor(path), [buffer[done:]], offset + done)):
                done += more  # some file systems give less than was asked for, before the end
        except OSError as error:
            raise fault(f"{label}: {self._directory}/{path} cannot be read: {error}", path, error) from error
        if done != size:
            text = f"{label}: {self._directory}/{path} ends at {offset + done}, expected {offset + size}"
            raise Suspect(text, files=[STATE + path])

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            with self._lock:
                if path not in self._open:
                    where = f"{self._directory}/{ocdbt.MANIFEST}"
                    check_key(path, where)  # it comes from storage
                    if self._stored is not None and path not in self._stored.files:
                        raise Damaged(f"{where}: leads to {path!r}, which the step's manifest does not list; not read")
                    try:
                        self._open[path] = self._root.open(f"{self._base}/{path}" if self._base else path)
                    except OSError as error:
                        text = f"{self._directory}/{path} cannot be opened: {error}"
                        raise fault(text, path, error) from error
        return self._open[path]

    def _whole(self, path: str, where: str) -> bytes:
        """A small file."""
        size = os.fstat(self._descriptor(path)).st_size
        if size > _MANIFEST_BYTES_MAX:
            raise Unavailable(f"{where}: has {size} bytes, at most {_MANIFEST_BYTES_MAX} were expected; it is not read")
        body = bytearray(size)
        self.read(memoryview(body), (path, 0, size), "the tree")
        return bytes(body)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

"""The merged OCDBT store of an attempt whose files lie in several places: directories of this machine, and what other
hosts serve."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

import crc32c

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.local_store import PIECE_BYTES, fault
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.arrays.reading.stored_tree import ObjectTree
from orchestrator.errors import Suspect
from orchestrator.rules.chunk_index import Chunk, Location, StoredFiles
from orchestrator.rules.keys import STATE
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES
from orchestrator.storage.port import OpenFile
from orchestrator.storage.sources import Source, Sources


@dataclass(frozen=True)
class Places:
    """Where the files of an attempt's `state/` are. prefix: of their keys in `sources`. whole: a small file by its
    path, checked."""

    sources: Sources
    prefix: str
    whole: Callable[[str], bytes | None]


class PlacedStore:
    """As `LocalStore`. A read takes the source that is asked for the file now, and drops none: whoever knows whether
    what came is right does."""

    def __init__(self, directory: str, stored: StoredFiles, places: Places) -> None:
        self._directory, self._stored, self.places = directory.rstrip("/"), stored, places
        self._lock = threading.Lock()
        self._open: dict[tuple[str, Source], OpenFile] = {}
        self._tree: list[str] = []

    def index(self) -> StoredIndex | None:
        """As `LocalStore.index`, from files that are checked whole: another attempt's tree is none of this one's."""
        self._tree = []
        with contextlib.suppress(ocdbt.Unsupported):
            return ObjectTree(self._directory, self._stored, self._whole).index()
        return None

    def _whole(self, path: str) -> bytes | None:
        self._tree.append(path)
        return self.places.whole(path)

    def files_of(self, chunk: Chunk | None) -> list[str]:
        return [chunk[0]] if isinstance(chunk, tuple) else sorted(set(self._tree))

    def current(self, path: str) -> Source:
        return self.places.sources.current(self.places.prefix + path)

    def read_into(
        self, elements: memoryview, place: Location, label: str, ending: int | None = None
    ) -> tuple[int, int]:
        """As `LocalStore.read_into`. ending: the checksum that the manifest has, which spares a request."""
        path, offset, _ = place
        if not self.current(path).is_remote or ending is None:
            tail = bytearray(CHECKSUM_BYTES)
            self.read(memoryview(tail), (path, offset + len(elements), len(tail)), label)
            ending = int.from_bytes(tail, "little")
        step = len(elements) if self.current(path).is_remote else PIECE_BYTES
        checksum = 0
        for first in range(0, len(elements), step):
            piece = elements[first : first + step]
            self.read(piece, (path, offset + first, len(piece)), label)
            checksum = crc32c.crc32c(piece, checksum)
        return checksum, ending

    def read(self, buffer: memoryview, place: Location, label: str) -> None:
        """As `LocalStore.read`."""
        path, offset, size = place
        source = self.current(path)
        where, done = f"{source.url}/{self.places.prefix}{path}", 0
        try:
            file = self._file(path, source)
            while done < size and (more := file.read(buffer[done:], offset + done)):
                done += more
        except OSError as error:
            raise fault(f"{label}: {where} cannot be read: {error}", path, error) from error
        if done != size:
            raise Suspect(f"{label}: {where} ends at {offset + done}, expected {offset + size}", files=[STATE + path])

    def _file(self, path: str, source: Source) -> OpenFile:
        key = path, source
        if key not in self._open:  # `walk` has found the path among the manifest's files
            with self._lock:
                if key not in self._open:
                    self._open[key] = source.open(self.places.prefix + path)
        return self._open[key]

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

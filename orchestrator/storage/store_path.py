"""What is below a URL of an object store, as folders and files: a listing taken once, and whole objects read by name.

For directories of other programs. What `pathlib.Path` has of the same names, it means here, too; there are no links and
no special files. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.storage import local_path, open_storage
from orchestrator.storage.port import Reads


class _Listing:
    def __init__(self, storage: Reads) -> None:
        self.storage = storage
        self.bytes: dict[str, int] = {}
        self.below: dict[str, dict[str, None]] = {}  # folder -> names, in order
        for entry in storage.list(""):
            self.bytes[entry.key] = entry.bytes
            name = entry.key
            while name:
                above, _, last = name.rpartition("/")
                known = above in self.below
                self.below.setdefault(above, {})[last] = None
                name = "" if known else above


class StorePath:
    """A name below the URL. Two of one listing compare by name."""

    def __init__(self, listing: _Listing, key: str) -> None:
        self._listing, self.key = listing, key

    @property
    def storage(self) -> Reads:
        return self._listing.storage

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def size(self) -> int:
        return self._listing.bytes[self.key]

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self._listing, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.storage.url}/{self.key}" if self.key else self.storage.url

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def absolute(self) -> StorePath:
        return self

    def is_dir(self) -> bool:
        return self.key in self._listing.below

    def is_file(self) -> bool:
        return self.key in self._listing.bytes

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[StorePath]:
        """In the order of their keys. Raises FileNotFoundError, NotADirectoryError."""
        if not self.is_dir():
            raise (NotADirectoryError if self.is_file() else FileNotFoundError)(str(self))
        for name in self._listing.below[self.key]:
            yield self / name

    def read_bytes(self, most_bytes: int) -> bytes:
        """Raises FileNotFoundError, TooLarge, StorageError."""
        body = self.storage.get(self.key, most_bytes)
        if body is None:
            raise FileNotFoundError(str(self))
        return body

    def stored_s(self) -> float:
        """When the object was stored, in seconds since 1970; 0 where nobody knows. Raises StorageError."""
        from orchestrator.storage import gcs, gcs_objects  # only where they are used: half a second

        return gcs_objects.stored_s(self.storage, self.key) if isinstance(self.storage, gcs.GcsStorage) else 0.0

    def pieces(self) -> Iterator[bytes]:
        """The object, in pieces, compared with the store's own checksum. Raises StorageError."""
        return object_pieces(self.storage, self.key)

    def copy_to(self, storage: Reads, key: str, on_bytes: Callable[[int], None]) -> None:
        """Have the store copy the object to another root in it. Raises StorageError."""
        from orchestrator.storage import gcs, gcs_objects

        assert isinstance(self.storage, gcs.GcsStorage) and isinstance(storage, gcs.GcsStorage)
        gcs_objects.copy(self.storage, self.key, storage, key, on_bytes)


AnyPath = Path | StorePath


def object_pieces(storage: Reads, key: str) -> Iterator[bytes]:
    """An object of Cloud Storage in pieces, compared with the store's own checksum. Raises StorageError."""
    from orchestrator.storage import gcs, gcs_objects

    assert isinstance(storage, gcs.GcsStorage)
    return gcs_objects.pieces(storage, key)


def any_path(where: str) -> AnyPath:
    """The directory at a local path or URL; of a store, listed now. Raises UsageError, StorageError."""
    path = local_path(where)
    return Path(path) if path is not None else StorePath(_Listing(open_storage(where)), "")


def url_of(path: AnyPath) -> str:
    return str(path) if isinstance(path, StorePath) else f"file://{path.absolute()}"


def size_of(path: AnyPath) -> int:
    """Raises OSError."""
    return path.size if isinstance(path, StorePath) else path.lstat().st_size

"""Bringing a file of this machine to a store, under the same key: read once, in pieces, and compared on the way with
what its writer counted. What does not fit is never given its name there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import crc32c

from orchestrator.errors import StorageError
from orchestrator.rules.records import FileEntry
from orchestrator.storage.port import Created, Exists, Storage
from orchestrator.storage.posix import PosixStorage


class Unreadable(StorageError):
    """What is to be brought to the store is not there any more, or not what was written."""


Passing = Callable[[int], None]  # told of so many bytes before they go; what it raises ends the upload


def upload(source: PosixStorage, target: Storage, known: FileEntry, passing: Passing) -> None:
    """Bring the object at key `known.path` from `source` to `target`; durable once `make_durable` has returned. One
    that is there already is of an earlier try whose answer was lost, or not ours: it is compared. Raises Unreadable,
    StorageError, of these Unavailable where another try may have more luck, and what `passing` raises."""
    made = _create(target, known, checked_pieces(source, known, passing))
    if isinstance(made, Exists):
        there = target.measure(known.path)
        if there is None or (there.bytes, there.crc32c) != (known.bytes, known.crc32c):
            raise StorageError(f"{target.url}/{known.path}: another writer was here; attempts are never reused")


def _create(target: Storage, known: FileEntry, pieces: Iterator[bytes]) -> Created | Exists:
    if isinstance(target, PosixStorage):
        return target.copy(known.path, known.path, lambda count: None, pieces)
    if target.url.startswith("gs://"):
        # gcsfs takes half a second to import: only where it is used
        from orchestrator.storage import gcs_objects
        from orchestrator.storage.gcs import GcsStorage

        if isinstance(target, GcsStorage):
            return gcs_objects.create(target, known, pieces)
    return target.create(known.path, b"".join(pieces))


def checked_pieces(source: PosixStorage, known: FileEntry, passing: Passing) -> Iterator[bytes]:
    """A file of `source`, in pieces. Raises Unreadable, before the last one, if it is not what is `known` of it."""
    checksum = count = 0
    for piece in _pieces(source, known.path):
        passing(len(piece))
        checksum, count = crc32c.crc32c(piece, checksum), count + len(piece)
        if count >= known.bytes:
            _check(source, known, count, checksum)
        yield piece
    _check(source, known, count, checksum)


def _pieces(source: PosixStorage, key: str) -> Iterator[bytes]:
    try:
        yield from source.pieces(key)
    except StorageError as error:
        raise Unreadable(str(error)) from error


def _check(source: PosixStorage, known: FileEntry, count: int, checksum: int) -> None:
    if (count, f"{checksum:08x}") != (known.bytes, known.crc32c):
        raise Unreadable(
            f"{source.url}/{known.path}: has {count} bytes with crc32c {checksum:08x}, {known.bytes} with "
            f"{known.crc32c} were written there; it is not used"
        )

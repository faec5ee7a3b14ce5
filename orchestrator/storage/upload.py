"""Bringing a file of this machine to a store, under the same key: read once, in pieces, and compared on the way with
what its writer counted. What does not fit is never given its name there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestrator.errors import StorageError
from orchestrator.rules.records import FileEntry
from orchestrator.storage.pieces import checked
from orchestrator.storage.port import Created, Exists, Storage
from orchestrator.storage.posix import PosixStorage


class Unreadable(StorageError):
    """What is to be brought to the store is not there any more, or not what was written."""


Passing = Callable[[int], None]  # told of so many bytes before they go; what it raises ends the upload


def upload(source: PosixStorage, target: Storage, known: FileEntry, passing: Passing) -> None:
    """Bring the object at key `known.path` from `source` to `target`; durable once `make_durable` has returned. One
    that is there already is of an earlier try whose answer was lost, or not ours: it is compared. Raises Unreadable,
    StorageError, of these Unavailable where another try may have more luck, and what `passing` raises."""

    def wrong(found: str) -> Unreadable:
        expected = f"{known.bytes} with {known.crc32c} were written there"
        return Unreadable(f"{source.url}/{known.path}: has {found}, {expected}; it is not used")

    made = _create(target, known, checked(known, _pieces(source, known.path), wrong, passing))
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


def _pieces(source: PosixStorage, key: str) -> Iterator[bytes]:
    try:
        yield from source.pieces(key)
    except StorageError as error:
        raise Unreadable(str(error)) from error

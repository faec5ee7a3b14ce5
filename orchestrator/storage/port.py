"""The storage port: what the rest of the package asks of a store, and no more. Records and receipts need one adapter
that has these methods, and a branch in `open_storage`; array data of a new store (S3, say) needs more: ARCHITECTURE.md,
"Where to add".

No overwrite and no rename: an object is created once, whole, or not at all. `create` is the one atomic operation that
the protocol rests on. Every adapter passes tests/storage/test_storage.py; `memory` is the executable specification.

Lost replies: a create can land and its reply be lost. Bodies that must be told apart carry a random `write_id`, so an
adapter that meets a conflict reads the object back and compares the bytes: equal means that the write was ours.

Errors: StorageError for what the store rejects (permission, disk full, I/O), OutcomeUnknown where a create may have
landed and cannot be read back. Methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from msgspec.structs import replace

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry


@dataclass(frozen=True)
class Created:
    """The object is durable under its key, with our bytes."""


@dataclass(frozen=True)
class Exists:
    """Somebody else's object is under that key; `body` is theirs. Nothing was changed."""

    body: bytes


@dataclass(frozen=True)
class Entry:
    """What a listing finds under a key. `problem`: why it is no object of a run (a link, a special file, a name that no
    key can have), '' for one that is; it is listed so that nobody takes it for missing."""

    key: str
    bytes: int
    problem: str = ""


class Reads(Protocol):
    """The half of the port that a read-only credential can do: three methods. A root with immutable objects under it;
    `url` is what people call it."""

    url: str

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        """The object's bytes, None if there is no such object. Raises TooLarge for one of more than `most_bytes`,
        which is not read: whoever expects more says how much."""

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        """Entries whose key begins with `prefix` and is >= `start`, in key order, always fresh."""

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        """Size and CRC-32C of the object as the store itself has it now, past every cache; None if the store says that
        there is no such object. What damage is proven by. The CRC-32C may be left out, '', for one of another size than
        `expected_bytes`: it is the wrong one already, and may have any size. Raises StorageError."""


@dataclass(frozen=True)
class Patience:
    """How long one operation on a store is tried, retries included. notify: gets one line for people, on the thread
    that waits, when the store has not answered for `notify_after_s`; once until it answers again."""

    deadline_s: float
    notify: Callable[[str], None] | None = None
    notify_after_s: float = 2.0


class Storage(Reads, Protocol):
    """The whole port: three methods more, for those who write. It is split so that read-only credentials suffice for
    `Reads`. What only some stores can do stands beside the port (`Rooted`, `Cached`, `DeletesMany`)."""

    def create(self, key: str, body: bytes) -> Created | Exists:
        """Put `body` under `key` if nothing is there. On `Created` it survives power loss."""

    def delete(self, key: str) -> bool:
        """Remove the object; False if there was none (deleting again is harmless)."""

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        """Make these objects durable and return key, size and CRC-32C of each, in the order given.

        For data that was written under the root's `url` without going through this port. `known`: what their writer
        counted, by key; those are not read again. Raises StorageError, also for one that has another size.
        """


class TooLarge(Unavailable):
    """An object was not read, as it is larger than anything that could be expected. `bytes`: as the store says."""

    def __init__(self, where: str, size: int, most_bytes: int) -> None:
        super().__init__(f"read {where}: has {size} bytes, at most {most_bytes} were expected; it is not read")
        self.bytes = size


class Gone(Unavailable):
    """There is no such object any more, or there never was, though it was to be read in parts."""


def checked_size(url: str, key: str, size: int, known: FileEntry) -> FileEntry:
    """The entry of an object that was made durable, from what its writer counted. Raises StorageError if the store has
    another size."""
    if size != known.bytes:
        raise StorageError(f"make_durable {url}/{key}: has {size} bytes, {known.bytes} were written; it is not used")
    return replace(known, path=key)


def local_path(root: str) -> str | None:
    """Where a root, given as a URL or as a path, is on this host's file systems; None if it is in an object store. The
    one answer to whether data can be opened, linked or appended to as files."""
    if root.startswith("file://"):
        return root.removeprefix("file://")
    return None if "://" in root else root


@runtime_checkable
class Rooted(Protocol):
    """What a store may offer beside the port, where a root can be taken away under an open job."""

    def check_root(self) -> None:
        """Raises RootChanged if the root is not the one that was opened."""


def check_root(storage: Storage) -> None:
    """Before much is written that does not go through the port. Raises RootChanged where the store can tell."""
    if isinstance(storage, Rooted):
        storage.check_root()


@runtime_checkable
class Cached(Protocol):
    """What a store may offer beside the port, where a cache may show for a while what was."""

    def refresh(self, key: str) -> None:
        """Have what is asked of `key` next answered by what is there now, as far as that can be had. Never raises."""


def refresh(storage: Reads, key: str) -> None:
    """Before something is looked for again which another host must have written."""
    if isinstance(storage, Cached):
        storage.refresh(key)


class OpenFile(Protocol):
    """An object that is open for reading parts of it."""

    def read(self, view: memoryview, offset: int) -> int:
        """As `os.preadv`: how many bytes from `offset` on are in `view` now; fewer than it takes also before the end.
        Any thread. Raises OSError, StorageError."""

    def close(self) -> None: ...


@runtime_checkable
class OpensFiles(Protocol):
    """What a store may offer beside the port, where objects are files of this machine."""

    def open(self, key: str) -> int:
        """A descriptor, for the caller to close. Raises OSError."""


@runtime_checkable
class ReadsParts(Protocol):
    """What a store may offer beside the port, where a part of an object can be had in one request."""

    def read_into(self, key: str, offset: int, view: memoryview) -> int:
        """As `OpenFile.read`."""


@runtime_checkable
class Failover(Protocol):
    """What a store may offer beside the port, where objects lie in several places."""

    def drop(self, key: str, reason: str) -> bool:
        """What it has given under `key` last is not what was written, and why: from now on another place is asked for
        it. False if there is no other; then nothing has changed."""


def drop(storage: Reads, key: str, reason: str) -> bool:
    """Whether there is another place to read `key` from, now that what came from the first is wrong."""
    return isinstance(storage, Failover) and storage.drop(key, reason)


@runtime_checkable
class DeletesMany(Protocol):
    """What a store may offer beside the port, where deleting one object at a time would be slow."""

    def delete_many(self, keys: Sequence[str]) -> Iterator[tuple[str, StorageError | None]]:
        """Delete all of `keys`, in any order, as the iterator goes on. Yields each, with what kept it from going."""

"""The storage port and its adapters. `open_storage` picks the adapter by the root's scheme."""

from __future__ import annotations

from orchestrator.errors import UsageError
from orchestrator.storage.base import Created, Entry, Exists, Storage
from orchestrator.storage.memory import MemoryStorage
from orchestrator.storage.posix import PosixStorage

__all__ = ["Created", "Entry", "Exists", "MemoryStorage", "PosixStorage", "Storage", "open_storage"]


def open_storage(root: str) -> Storage:
    """The store at `root`: a local path or `file://` URL. Touches nothing.

    Raises UsageError for an empty root or a scheme without an adapter.
    """
    if not root:
        raise UsageError("the run's root is empty; wanted a directory or a URL")
    scheme, separator, rest = root.partition("://")
    if not separator:
        return PosixStorage(root)
    if scheme == "file":
        return PosixStorage(rest)
    if scheme == "gs":
        from orchestrator.storage.gcs import GcsStorage  # gcsfs takes half a second to import: only where it is used

        return GcsStorage(root)
    raise UsageError(f"{root}: no storage for {scheme}://; wanted a local path, file:// or gs://")

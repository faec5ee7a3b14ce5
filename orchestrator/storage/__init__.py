"""The storage port and its adapters. `open_storage` picks the adapter by the root's scheme."""

from __future__ import annotations

import os
import re

from orchestrator.errors import UsageError
from orchestrator.rules import arguments
from orchestrator.storage.memory import MemoryStorage
from orchestrator.storage.port import Created, Entry, Exists, Patience, Storage, local_path
from orchestrator.storage.posix import PosixStorage

__all__ = [
    "Created",
    "Entry",
    "Exists",
    "MemoryStorage",
    "Patience",
    "PosixStorage",
    "Storage",
    "local_path",
    "open_storage",
]


def open_storage(root: str | os.PathLike[str], patience: Patience | None = None) -> Storage:
    """The store at `root`: a local path, `file://` or `gs://`. Touches nothing. patience: with a store that does not
    answer; None: a job's, of `ORCHESTRATOR_STORE_DEADLINE_S`.

    Raises UsageError for what is no root, an empty one, or a scheme without an adapter.
    """
    where = _text(root)
    scheme, separator, rest = where.partition("://")
    if not separator:
        return PosixStorage(where)
    if scheme == "file":
        if not rest.startswith("/"):
            raise UsageError(f"root={where!r}: expected file:// and an absolute path, as file:///data/run")
        return PosixStorage(rest)
    if scheme == "gs":
        from orchestrator.storage.gcs import GcsStorage  # gcsfs takes half a second to import: only where it is used

        return GcsStorage(where, patience=patience)
    plain = scheme.lower().replace("gcs", "gs")
    if plain in ("file", "gs"):
        raise UsageError(f"root={where!r}: no storage for {scheme}://; expected '{plain}://{rest}'")
    raise UsageError(f"{where}: no storage for {scheme}://; expected a local path, file:// or gs://")


_SCHEMES = frozenset({"file", "gs", "gcs", "s3", "http", "https", "az", "abfs", "hdfs", "memory"})


def _check_scheme(where: str) -> None:
    """Reject what was meant as a URL and is none: it would be made as a directory of that name."""
    found = re.match("([A-Za-z][A-Za-z0-9+.-]*):(?!//)(/?)(.*)", where, re.DOTALL)
    if not found or not (found[2] or found[1].lower() in _SCHEMES):
        return  # a plain name may have a colon in it
    scheme, slash, rest = found[1].lower().replace("gcs", "gs"), found[2], found[3]
    lost = "has lost a slash, as a Path does to a URL; give it as a str" if slash else "is no URL"
    meant = (f"file:///{rest}" if slash else rest) if scheme == "file" else f"{scheme}://{rest}"
    raise UsageError(f"root={where!r}: {lost}; expected {meant!r}, or './{where}' for a directory of that name")


def _text(root: object) -> str:
    where = os.fspath(root) if isinstance(root, os.PathLike) else root
    if not isinstance(where, str):
        raise arguments.rejection("root", root, "a directory or a URL, as str or Path")
    if not where:
        raise UsageError("the run's root is empty; expected a directory or a URL")
    _check_scheme(where)
    if "\0" in where or not arguments.is_utf8(where):  # events and messages are UTF-8
        raise arguments.rejection("root", where, "a name in UTF-8 without null characters")
    return where

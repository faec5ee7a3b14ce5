"""What a directory was given as `metadata=`, by the first manager that had any: where Orbax has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.arrays.format import orbax_json
from orchestrator.errors import UsageError
from orchestrator.rules import arguments
from orchestrator.rules.records import Json
from orchestrator.storage.port import Storage
from orchestrator.storage.store_path import AnyPath

FILE = "metadata/_ROOT_METADATA"
_LEGACY = "metadata/metadata"  # of Orbax before 0.10


def checked(metadata: Any) -> dict[str, Json]:
    """Raises UsageError naming what is no plain JSON."""
    if metadata is not None and not hasattr(metadata, "items"):
        raise UsageError(f"metadata={type(metadata).__name__}: give a dict")
    return {name: arguments.plain_json(f"metadata[{name!r}]", value) for name, value in (metadata or {}).items()}


def read(storage: Storage) -> dict[str, Json] | None:
    """None where there is none yet. Raises StorageError, Damaged."""
    for name in (FILE, _LEGACY):
        body = storage.get(name)
        if body is not None:
            return _parsed(body, name)
    return None


def found(directory: AnyPath) -> dict[str, Json] | None:
    """Of a directory of Orbax's; None without any. Raises Damaged, StorageError."""
    for name in (FILE, _LEGACY):
        file = directory / "metadata" / name.rpartition("/")[2]
        if file.is_file():
            return _parsed(orbax_json.read_bytes(file), name)
    return None


def _parsed(body: bytes, name: str) -> dict[str, Json]:
    about = orbax_json.parse(body, dict[str, Any], name)
    return about if name == _LEGACY else about.get("custom_metadata") or {}


def keep(storage: Storage, metadata: Mapping[str, Json]) -> None:
    """For every manager of this directory from now on, unless there is some already."""
    storage.create(FILE, encoded(metadata))


def encoded(metadata: Mapping[str, Json]) -> bytes:
    """As Orbax writes it."""
    return json.dumps({"internal_metadata": {}, "custom_metadata": dict(metadata)}).encode()

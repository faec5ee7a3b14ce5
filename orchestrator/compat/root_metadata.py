"""What a directory was given as `metadata=`, by the first manager that had any: where Orbax has it."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.arrays.format import orbax_json
from orchestrator.errors import UsageError
from orchestrator.rules import arguments
from orchestrator.rules.records import Json
from orchestrator.storage.port import Storage

FILE = "metadata/_ROOT_METADATA"
_LEGACY = "metadata/metadata"  # of Orbax before 0.11


def checked(metadata: Any) -> dict[str, Json]:
    """Raises UsageError naming what is no plain JSON."""
    if metadata is not None and not hasattr(metadata, "items"):
        raise UsageError(f"metadata={type(metadata).__name__}: give a dict")
    return {name: arguments.plain_json(f"metadata[{name!r}]", value) for name, value in (metadata or {}).items()}


def read(storage: Storage) -> dict[str, Json] | None:
    """None where there is none yet. Raises StorageError, Damaged."""
    body = storage.get(FILE)
    if body is not None:
        return orbax_json.parse(body, dict[str, Any], FILE).get("custom_metadata") or {}
    body = storage.get(_LEGACY)
    return None if body is None else orbax_json.parse(body, dict[str, Any], _LEGACY)


def keep(storage: Storage, metadata: dict[str, Json]) -> None:
    """For every manager of this directory from now on, unless there is some already."""
    storage.create(FILE, encoded(metadata))


def encoded(metadata: dict[str, Json]) -> bytes:
    """As Orbax writes it."""
    return json.dumps({"internal_metadata": {}, "custom_metadata": metadata}).encode()

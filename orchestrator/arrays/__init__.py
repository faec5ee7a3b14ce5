"""The data plane: pytrees to and from an ordinary Orbax checkpoint. The only importer of both."""

from __future__ import annotations

from orchestrator.arrays.foreign import describe, is_tree
from orchestrator.arrays.placing import Load, sharding_of
from orchestrator.arrays.reading import check, load, slabs
from orchestrator.arrays.sharing import groups
from orchestrator.arrays.writing import ArrayOptions, ArrayWriter, PendingWrite, WriteStopped

__all__ = [
    "ArrayOptions",
    "ArrayWriter",
    "Load",
    "PendingWrite",
    "WriteStopped",
    "check",
    "describe",
    "groups",
    "is_tree",
    "load",
    "sharding_of",
    "slabs",
]

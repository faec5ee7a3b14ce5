"""The data plane: pytrees to and from an ordinary Orbax checkpoint. The only importer of both."""

from __future__ import annotations

from orchestrator.arrays.foreign import describe, is_tree
from orchestrator.arrays.placing import ReadRequest, as_array
from orchestrator.arrays.reading import check, load, slabs
from orchestrator.arrays.sharing import groups
from orchestrator.arrays.wanted import shardings_of
from orchestrator.arrays.writing import ArrayOptions, ArrayWriter, PendingWrite, WriteStopped

__all__ = [
    "ArrayOptions",
    "ArrayWriter",
    "PendingWrite",
    "ReadRequest",
    "WriteStopped",
    "as_array",
    "check",
    "describe",
    "groups",
    "is_tree",
    "load",
    "shardings_of",
    "slabs",
]

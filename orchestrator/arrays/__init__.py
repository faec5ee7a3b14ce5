"""The data plane: pytrees to and from an ordinary Orbax checkpoint. The only importer of both."""

from __future__ import annotations

from orchestrator.arrays.format.external_items import describe, is_tree
from orchestrator.arrays.reading.exchange import groups
from orchestrator.arrays.reading.placing import ReadRequest, as_array
from orchestrator.arrays.reading.read import check, load, slabs
from orchestrator.arrays.reading.target_shardings import shardings_of
from orchestrator.arrays.writing.write import ArrayOptions, ArrayWriter, PendingWrite, WriteStopped

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

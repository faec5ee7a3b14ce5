"""The data plane: pytrees to and from an ordinary Orbax checkpoint. The only importer of both."""

from __future__ import annotations

from orchestrator.arrays.format.external_items import describe, is_tree
from orchestrator.arrays.reading.check_chunks import check
from orchestrator.arrays.reading.device_arrays import as_array
from orchestrator.arrays.reading.exchange import ExchangeGroup, exchange_groups
from orchestrator.arrays.reading.read import load, slabs
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.arrays.reading.target_shardings import shardings_of
from orchestrator.arrays.writing.write import ArrayOptions, ArrayWriter, PendingWrite, WriteStopped

__all__ = [
    "ArrayOptions",
    "ArrayWriter",
    "ExchangeGroup",
    "PendingWrite",
    "ReadRequest",
    "WriteStopped",
    "as_array",
    "check",
    "describe",
    "exchange_groups",
    "is_tree",
    "load",
    "shardings_of",
    "slabs",
]

"""The data plane: pytrees to and from an ordinary Orbax checkpoint. The only importer of Orbax and TensorStore.

What the other rooms use is here. Besides, they may import these modules whole: `fingerprint`, `jax_context`, and what
reads Orbax's own files and names, `format.orbax_api` and `format.orbax_json`.
"""

from __future__ import annotations

from orchestrator.arrays.element_types import numpy_dtype
from orchestrator.arrays.format.external_items import describe, describe_array, is_array, is_tree
from orchestrator.arrays.inline_values import inline_value
from orchestrator.arrays.reading.buffers import bytes_to_read
from orchestrator.arrays.reading.check_chunks import check
from orchestrator.arrays.reading.exchange import ExchangeGroup, exchange_groups
from orchestrator.arrays.reading.matched_target import MatchedTarget, match_tree
from orchestrator.arrays.reading.placed_store import Places
from orchestrator.arrays.reading.read import load, slabs
from orchestrator.arrays.reading.requests import ReadRequest
from orchestrator.arrays.tree import Flat, Form, flatten, targets, tree_path
from orchestrator.arrays.writing.item_directories import link_files, write_items
from orchestrator.arrays.writing.write import ArrayOptions, ArrayWriter, PendingWrite, WriteStopped
from orchestrator.arrays.writing.write_plan import views

__all__ = [
    "ArrayOptions",
    "ArrayWriter",
    "ExchangeGroup",
    "Flat",
    "Form",
    "MatchedTarget",
    "PendingWrite",
    "Places",
    "ReadRequest",
    "WriteStopped",
    "bytes_to_read",
    "check",
    "describe",
    "describe_array",
    "exchange_groups",
    "flatten",
    "inline_value",
    "is_array",
    "is_tree",
    "link_files",
    "load",
    "match_tree",
    "numpy_dtype",
    "slabs",
    "targets",
    "tree_path",
    "views",
    "write_items",
]

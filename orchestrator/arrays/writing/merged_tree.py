"""The tree that readers open: it names every chunk of every process, and holds the small ones."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.writing import data_files
from orchestrator.arrays.writing.write_plan import KeyOrder, Plan
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Chunks
from orchestrator.rules.records import FileEntry


def write_tree(directory: str, plan: Plan, entries: Chunks) -> tuple[FileEntry, ...]:
    """Write the OCDBT store of the `state/` at URL `directory`: key -> the chunk, or its place. Returns the files.

    Raises Damaged if `entries` are not exactly the chunks that the arrays consist of.
    """
    path = data_files.data_file_path()
    tree = encoded(plan.order, plan.metadata, entries, path)
    if tree is None:
        return ()
    nodes, manifest = tree
    written = {path: nodes, ocdbt.MANIFEST: manifest}
    files = data_files.write_files(data_files.opener(directory), written)
    return tuple(data_files.entry(path, file) for path, file in files.items())


def encoded(order: KeyOrder, metadata: Mapping[str, bytes], entries: Chunks, path: str) -> tuple[bytes, bytes] | None:
    """The store's nodes, which are going to be the data file `path`, and its manifest; None of no keys. Raises Damaged
    unless `order` are the keys of `metadata` and `entries`, each once."""
    inline = {**entries.small, **metadata}
    every = itertools.chain(entries.keys_in_files, inline)
    # Rows are looked up in what is planned once, for no key of a save has to be put into a dictionary then.
    rows = np.fromiter(map(order.rows.get, every, itertools.repeat(-1)), np.int64)
    once = np.bincount(rows + 1, minlength=len(order.raw) + 1)[1:] == 1
    if len(rows) != len(order.raw) or not once.all() or len(inline) != len(entries.small) + len(metadata):
        _raise_different(order, metadata, entries)
    if not order.raw:
        return None
    in_files, in_tree = np.split(rows, [len(entries.keys_in_files)])
    files, offsets, sizes = (np.full(len(rows), -1, np.int64) for _ in range(3))
    for column, source in ((files, entries.files), (offsets, entries.offsets), (sizes, entries.sizes)):
        column[in_files] = np.asarray(source, np.int64)
    values = list(inline.values())
    sizes[in_tree] = list(map(len, values))
    values = [values[number] for number in np.argsort(in_tree).tolist()]
    columns = ocdbt.Columns([name.encode() for name in entries.paths], files, offsets, sizes, values)
    return ocdbt.encode_columns(order.raw, columns, path, 0, uuid.uuid4().bytes, time.time_ns())


def _raise_different(order: KeyOrder, metadata: Mapping[str, bytes], entries: Chunks) -> NoReturn:
    expected, found = order.rows.keys() - metadata.keys(), set(entries)
    missing, unknown = sorted(expected - found), sorted(found - expected)
    raise Damaged(
        f"{len(expected) - len(missing)} of {len(expected)} chunks were written, and {len(unknown)} of no array: "
        f"missing {missing[:3]}, unknown {unknown[:3]}"
    )

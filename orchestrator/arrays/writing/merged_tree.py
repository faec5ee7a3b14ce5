"""The tree that readers open: it names every chunk of every process, and holds the small ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.writing import data_files
from orchestrator.arrays.writing.write_plan import Plan
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Chunk
from orchestrator.rules.records import FileEntry


def write_tree(directory: str, plan: Plan, entries: Mapping[str, Chunk]) -> tuple[FileEntry, ...]:
    """Write the OCDBT store of the `state/` at URL `directory`: key -> the chunk, or its place. Returns the files.

    Raises Damaged if `entries` are not exactly the chunks that the arrays consist of.
    """
    if entries.keys() != plan.keys:
        missing, unknown = sorted(plan.keys - entries.keys()), sorted(entries.keys() - plan.keys)
        raise Damaged(
            f"{len(plan.keys) - len(missing)} of {len(plan.keys)} chunks were written, and {len(unknown)} of no array: "
            f"missing {missing[:3]}, unknown {unknown[:3]}"
        )
    if not plan.order:
        return ()
    everything: dict[str, Chunk] = {**entries, **plan.metadata}
    opened = data_files.opener(directory)
    path = data_files.data_file_path()
    keys, values = [raw for _, raw in plan.order], [everything[key] for key, _ in plan.order]
    nodes, manifest = ocdbt.encode(keys, values, path, 0, uuid.uuid4().bytes, time.time_ns())
    written = {path: nodes, ocdbt.MANIFEST: manifest}
    return tuple(data_files.entry(path, file) for path, file in data_files.write_files(opened, written).items())

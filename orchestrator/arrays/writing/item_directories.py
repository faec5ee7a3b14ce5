"""One item of a state that holds several, as a directory that Orbax reads: hard links to the data files, and a tree of
its own that names their chunks without the item. No array data is copied but small chunks, which are in the tree."""

from __future__ import annotations

import base64
import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.writing import data_files
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Chunk, StoredFiles

_BARE = "array"  # Orbax's name for an item that is an array itself


def link_files(state: Path, directory: Path, paths: Iterable[str]) -> None:
    """Give files of `state` the same names below `directory`. Raises OSError; Damaged for one behind a link."""
    above = os.path.realpath(state)
    for path in paths:
        source = state / path
        if os.path.realpath(source) != os.path.join(above, path):
            raise Damaged(f"{source}: behind a symbolic link; what is below a root may have none")
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target, follow_symlinks=False)


def write_items(state: Path, stored: StoredFiles, items: dict[str, Path]) -> None:
    """Fill a directory for each item, by name. `state`: the attempt's own. Raises OSError, Suspect, Unavailable."""
    index = LocalStore(f"{state}/", stored).index()
    if index is None:
        raise Damaged(f"{state}: its tree is one that only TensorStore reads")
    described = {name: _read(state, name) for name in ("_METADATA", "_sharding", "array_metadatas/process_0")}
    strings = _read(state, "_strings.json")
    for item, directory in items.items():
        directory.mkdir(parents=True, exist_ok=True)
        _write_tree(state, directory, _below(index, item))
        for name, body in described.items():
            if body is not None:
                _write(directory / name, _DESCRIPTIONS[name](body, item))
        if strings is not None:
            prefix = f"{item}."
            _write(directory / "_strings.json", {k.removeprefix(prefix): v for k, v in strings.items() if k != item})


def _below(index: dict[str, Chunk], item: str) -> dict[str, Chunk]:
    found = {}
    for key, chunk in index.items():
        if key.startswith(f"{item}."):
            found[key.removeprefix(f"{item}.")] = chunk
        elif key.startswith(f"{item}/"):
            found[_BARE + key.removeprefix(item)] = chunk
    return found


def _write_tree(state: Path, directory: Path, entries: dict[str, Chunk]) -> None:
    if not entries:
        return
    names = sorted(entries)  # as their bytes are: UTF-8 keeps the order of code points
    path = data_files.data_file_path()
    encoded, chunks = [name.encode() for name in names], [entries[name] for name in names]
    nodes, manifest = ocdbt.encode(encoded, chunks, path, 0, uuid.uuid4().bytes, time.time_ns())
    for name, body in ((path, nodes), (ocdbt.MANIFEST, manifest)):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(body)
    link_files(state, directory, sorted({chunk[0] for chunk in entries.values() if isinstance(chunk, tuple)}))


def _read(state: Path, name: str) -> Any:
    file = state / name
    return json.loads(file.read_bytes()) if file.is_file() else None


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def _tree_metadata(body: Any, item: str) -> Any:
    below = {}
    for entry in body["tree_metadata"].values():
        first, *rest = entry["key_metadata"]
        if first["key"] == item:
            below[str(tuple(each["key"] for each in rest))] = {**entry, "key_metadata": rest}
    return {**body, "tree_metadata": below}


def _shardings(body: Any, item: str) -> Any:
    names = {base64.b64decode(name).decode(): text for name, text in body.items()}
    inside = {name.removeprefix(f"{item}."): text for name, text in names.items() if name.startswith(f"{item}.")}
    return {base64.b64encode(name.encode()).decode(): text for name, text in inside.items()}


def _array_metadatas(body: Any, item: str) -> Any:
    inside = []
    for entry in body["array_metadatas"]:
        about = entry["array_metadata"]
        if about["param_name"].startswith(f"{item}."):
            name = about["param_name"].removeprefix(f"{item}.")
            inside.append({"array_metadata": {**about, "param_name": name}})
    return {"array_metadatas": inside}


_DESCRIPTIONS = {
    "_METADATA": _tree_metadata,
    "_sharding": _shardings,
    "array_metadatas/process_0": _array_metadatas,
}

"""One item of a state that holds several, as a directory that Orbax reads: hard links to the data files, and a tree of
its own that names their chunks without the item. No array data is copied but small chunks, which are in the tree."""

from __future__ import annotations

import base64
import json
import os
import re
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.arrays.format import ocdbt, orbax_files
from orchestrator.arrays.reading.local_store import LocalStore
from orchestrator.arrays.writing import data_files
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Chunk, StoredFiles
from orchestrator.rules.records import LeafSpec

_BARE = "array"  # Orbax's name in a store for a tree that is an array itself
_ALONE = "checkpoint"  # and for the array of an item that its array handler has saved, in a tree of its own
_KEY = re.compile(r"(.*)/(zarr\.json|c(?:/[0-9]+)*)", re.DOTALL)  # of zarr3: metadata, or a chunk

Names = dict[str, str]  # of an array in the state -> in its item


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


def write_items(
    state: Path, stored: StoredFiles, leaves: Sequence[LeafSpec], items: dict[str, Path], alone: Collection[str]
) -> None:
    """Fill a directory for each item, by name. `state`: the attempt's own; `leaves`: of its tree, which alone tell the
    items apart: to Orbax's names, `a.b.c` may be of an item `a`, or `a.b`. alone: items that Orbax's array handler
    reads. Raises OSError, Suspect, Unavailable."""
    index = LocalStore(f"{state}/", stored).index()
    if index is None:
        raise Damaged(f"{state}: its tree is one that only TensorStore reads")
    described = {name: _read(state, name) for name in ("_METADATA", "_sharding", "array_metadatas/process_0")}
    names: dict[str, Names] = {}
    for leaf in leaves:
        if leaf.path:
            below = (_ALONE,) if len(leaf.path) == 1 and leaf.path[0] in alone else leaf.path[1:]
            names.setdefault(leaf.path[0], {})[leaf.name] = ".".join(below)
    texts = [leaf for leaf in leaves if leaf.kind == "str"]
    chunks = _by_array(index)
    for item, directory in items.items():
        directory.mkdir(parents=True, exist_ok=True)
        own = names.get(item, {})
        bare = own.get(item) == ""  # the array is the item
        entries = {
            f"{name}/{rest}" if (name := _BARE if bare else inner) else rest: chunk
            for whole, inner in own.items()
            for rest, chunk in chunks.get(whole, {}).items()
        }
        _write_tree(state, directory, entries)
        for name, body in described.items():
            if body is not None:
                _write(directory / name, _DESCRIPTIONS[name](body, item, own))
        inside = [(own[leaf.name], leaf.value) for leaf in texts if leaf.path[0] == item]
        if inside:
            (directory / "_strings.json").write_bytes(orbax_files.strings(inside))


def _by_array(index: Mapping[str, Chunk]) -> dict[str, dict[str, Chunk]]:
    """Array's name -> what is stored of it, by the rest of its key. A name may have slashes, the rest may not be of
    another form."""
    found: dict[str, dict[str, Chunk]] = {}
    for key, chunk in index.items():
        if parts := _KEY.fullmatch(key):
            found.setdefault(parts[1], {})[parts[2]] = chunk
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


def _tree_metadata(body: Any, item: str, own: Names) -> Any:
    below = {}
    for entry in body["tree_metadata"].values():
        first, *rest = entry["key_metadata"]
        if first["key"] == item:
            if own.get(item) == _ALONE:
                rest = [{"key": _ALONE, "key_type": 2}]
            below[str(tuple(each["key"] for each in rest))] = {**entry, "key_metadata": rest}
    return {**body, "tree_metadata": below}


def _shardings(body: Any, item: str, own: Names) -> Any:
    names = {base64.b64decode(name).decode(): text for name, text in body.items()}
    inside = {own[name]: text for name, text in names.items() if name in own}
    return {base64.b64encode(name.encode()).decode(): text for name, text in inside.items()}


def _array_metadatas(body: Any, item: str, own: Names) -> Any:
    abouts = [entry["array_metadata"] for entry in body["array_metadatas"]]
    inside = [{**about, "param_name": own[about["param_name"]]} for about in abouts if about["param_name"] in own]
    if own.get(item) == _ALONE:  # a typed key's kind is beside it
        inside = [{**about, "ext_metadata": None} for about in inside]
    return {"array_metadatas": [{"array_metadata": about} for about in inside]}


_DESCRIPTIONS = {
    "_METADATA": _tree_metadata,
    "_sharding": _shardings,
    "array_metadatas/process_0": _array_metadatas,
}

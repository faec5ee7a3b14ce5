"""The tree of a stored OCDBT store, walked here before anything else decodes it: bounded, and within the files that
the step's manifest lists. TensorStore would follow a tree wherever it leads, and decode what it finds to any size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from orchestrator.arrays.format import ocdbt
from orchestrator.arrays.reading.stored_index import StoredIndex
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Location, StoredFiles
from orchestrator.rules.keys import check_key
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

_NODES = "d/"  # data files of the store itself; a process's are in its own store


def walk(
    root: ocdbt.NodeRef, node: Callable[[Location], bytes], directory: str, stored: StoredFiles | None
) -> StoredIndex:
    """What all nodes hold, each of which is read once, by `node`. Raises Damaged, Unsupported."""
    leaves: list[ocdbt.Entries] = []
    nodes, seen = [(b"", root)], {root.place}
    while nodes:
        prefix, one = nodes.pop()
        where = f"{directory}/{one.place[0]}"
        entries, children = ocdbt.decode_node(node(one.place), one, prefix, where)
        places = {child.place for _, child in children}
        if len(places) < len(children) or places & seen:
            raise Damaged(f"{where}: not a tree: nodes of it are there twice")
        if entries is not None:
            _check_keys(where, entries)
            _check_listed(where, entries, stored)
            leaves.append(entries)
        seen |= places
        nodes += children
    index = StoredIndex(leaves)
    if len(index) < sum(map(len, leaves)):
        raise Damaged(f"{directory}/{root.place[0]}: not a tree: keys of it are there twice")
    return index


def _check_keys(where: str, entries: ocdbt.Entries) -> None:
    try:
        entries.table.rows  # noqa: B018  they are made out now, and kept
    except UnicodeDecodeError as error:
        raise Damaged(f"{where}: a key that is not UTF-8: {error}") from error


def _check_listed(where: str, entries: ocdbt.Entries, stored: StoredFiles | None) -> None:
    """The values that are in data files are in files that the manifest lists, and end there."""
    if stored is None:
        return
    sizes = np.array([stored.files.get(path, -1) for path in entries.paths], np.int64)
    rows = np.flatnonzero(entries.files >= 0)
    room = sizes[entries.files[rows]] - entries.sizes[rows]  # 63 bits each, so that none of this overflows
    if len(wrong := rows[entries.offsets[rows] > room]):
        path, offset, size = entries.value(int(wrong[0]))
        assert isinstance(path, str)
        check_key(path, where)  # it comes from storage
        listed = "does not list" if path not in stored.files else f"says has {stored.files[path]} bytes"
        raise Damaged(f"{where}: leads to {size} bytes at {offset} of {path!r}, which the manifest {listed}")


class ObjectTree:
    """The tree of a store in a bucket. Its objects are read whole, and only those that `stored` lists, none larger than
    it says. read: an object's bytes by path, None if there is none."""

    def __init__(self, directory: str, stored: StoredFiles, read: Callable[[str], bytes | None]) -> None:
        self._directory, self._stored, self._read = directory.rstrip("/"), stored, read
        self._objects: dict[str, bytes] = {}
        self._begun: dict[str, Begun[bytes | None]] = {}

    def index(self) -> StoredIndex:
        """Key -> value, or its place. Raises Damaged, Unsupported, and what `read` raises."""
        files = self._stored.files
        likely = [path for path in files if path.startswith(_NODES) and files[path] <= ocdbt.NODE_BYTES_MAX]
        if len(likely) == 1:  # of ours; read while the manifest is, which leads to it
            self._begun = {path: overlap.begin(partial(self._read, path)) for path in likely}
        root = ocdbt.decode_manifest(self._object(ocdbt.MANIFEST), f"{self._directory}/{ocdbt.MANIFEST}")
        return walk(root, self._node, self._directory, self._stored) if root else StoredIndex(())

    def _node(self, place: Location) -> bytes:
        path, offset, size = place
        body = self._object(path)
        if size > ocdbt.NODE_BYTES_MAX or offset + size > len(body):
            raise Damaged(f"{self._directory}/{path}: a node of {size} bytes at {offset}; the object has {len(body)}")
        return body[offset : offset + size]

    def _object(self, path: str) -> bytes:
        if path not in self._objects:
            where = f"{self._directory}/{check_key(path, self._directory)}"
            listed = self._stored.files.get(path)
            if listed is None:
                raise Damaged(f"{where}: is led to, and the step's manifest does not list it; not read")
            if listed > ocdbt.NODE_BYTES_MAX:
                raise Damaged(f"{where}: nodes in an object of {listed} bytes; ours are in one of their own; not read")
            begun = self._begun.pop(path, None)
            body = begun.result() if begun else self._read(path)
            if body is None or len(body) != listed:
                has = "is missing" if body is None else f"has {len(body)} bytes"
                raise Damaged(f"{where}: {has}, the manifest says {listed}")
            self._objects[path] = body
        return self._objects[path]

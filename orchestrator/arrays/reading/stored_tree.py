"""The tree of a stored OCDBT store, walked here before anything else decodes it: bounded, and within the files that
the step's manifest lists. TensorStore would follow a tree wherever it leads, and decode what it finds to any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from orchestrator.arrays.format import ocdbt
from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Chunk, Location, StoredFiles
from orchestrator.rules.keys import check_key
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

_NODES = "d/"  # data files of the store itself; a process's are in its own store


def walk(
    root: ocdbt.NodeRef, node: Callable[[Location], bytes], directory: str, stored: StoredFiles | None
) -> dict[str, Chunk]:
    """Key -> value or its place, of all nodes, each of which is read once, by `node`. Raises Damaged, Unsupported."""
    found: dict[str, Chunk] = {}
    nodes, seen, keys = [(b"", root)], {root.place}, 0
    while nodes:
        prefix, one = nodes.pop()
        where = f"{directory}/{one.place[0]}"
        entries, children = ocdbt.decode_node(node(one.place), one, prefix, where)
        try:
            found |= {key.decode(): value for key, value in entries}
        except UnicodeDecodeError as error:
            raise Damaged(f"{where}: a key that is not UTF-8: {error}") from error
        _check_listed(where, (value for _, value in entries if not isinstance(value, bytes)), stored)
        keys += len(entries)
        places = {child.place for _, child in children}
        if len(places) < len(children) or places & seen or len(found) < keys:
            raise Damaged(f"{where}: not a tree: nodes or keys of it are there twice")
        seen |= places
        nodes += children
    return found


def _check_listed(where: str, places: Iterable[Location], stored: StoredFiles | None) -> None:
    if stored is None:
        return
    sizes = stored.files
    for path, offset, size in places:
        if sizes.get(path, -1) < offset + size:
            check_key(path, where)  # it comes from storage
            listed = "does not list" if path not in sizes else f"says has {sizes[path]} bytes"
            raise Damaged(f"{where}: leads to {size} bytes at {offset} of {path!r}, which the manifest {listed}")


class ObjectTree:
    """The tree of a store in a bucket. Its objects are read whole, and only those that `stored` lists, none larger than
    it says. read: an object's bytes by path, None if there is none."""

    def __init__(self, directory: str, stored: StoredFiles, read: Callable[[str], bytes | None]) -> None:
        self._directory, self._stored, self._read = directory.rstrip("/"), stored, read
        self._objects: dict[str, bytes] = {}
        self._begun: dict[str, Begun[bytes | None]] = {}

    def index(self) -> dict[str, Chunk]:
        """Key -> value, or its place. Raises Damaged, Unsupported, and what `read` raises."""
        files = self._stored.files
        likely = [path for path in files if path.startswith(_NODES) and files[path] <= ocdbt.NODE_BYTES_MAX]
        if len(likely) == 1:  # of ours; read while the manifest is, which leads to it
            self._begun = {path: overlap.begin(partial(self._read, path)) for path in likely}
        root = ocdbt.decode_manifest(self._object(ocdbt.MANIFEST), f"{self._directory}/{ocdbt.MANIFEST}")
        return walk(root, self._node, self._directory, self._stored) if root else {}

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

"""A committed step as files of another format, gathered whole from all shards, in bounded memory.

The destination appears under its name only when it is complete; what an interrupted export leaves is `.NAME.partial-*`
beside it. Every chunk is checked as in a restore. Names from storage never become paths as they are.

numpy:        a directory, one `.npy` for each array, and `index.json` (each leaf's path, type, file; values kept in the
              tree spec; metrics and extra)
safetensors:  one file; leaf paths joined with dots are the names; other leaves and the metrics are in `__metadata__`
orbax:        a directory that is an ordinary Orbax checkpoint: the step's own files, each compared with the manifest,
              and then every chunk in the copy
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import crc32c
import numpy as np

from orchestrator import arrays
from orchestrator.arrays import numpy_dtype
from orchestrator.errors import Damaged, StorageError, UsageError
from orchestrator.rules import arguments, chunk_index, keys
from orchestrator.rules.records import Box, FileEntry, LeafSpec, LiveStep, TreeSpec
from orchestrator.rules.restore_cost import leaf_bytes
from orchestrator.run import stored_arrays
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import local_path
from orchestrator.storage.store_path import object_pieces

SLAB_BYTES = 64 << 20
_PIECE_BYTES = 8 << 20  # of a file that is copied
_NAME_MAX = 200  # longer ones are numbered: file systems allow 255 bytes
# https://huggingface.co/docs/safetensors, as its library (0.6) names types; others have no name there.
_SAFETENSORS = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_SAFETENSORS_OWN = frozenset({"__metadata__"})
_NATIVE_NPY = frozenset("?bhilqBHILQefdFD")  # what numpy reads back without another package


@dataclass(frozen=True)
class Source:
    """What is exported. `on_bytes`: called with the bytes of each read."""

    step: StoredStep
    tree: TreeSpec
    about: dict[str, Any]
    on_bytes: Callable[[int], None]

    @property
    def state_bytes(self) -> int:
        return sum(map(leaf_bytes, self.tree.leaves))


def open_source(
    store: JournalStore, live: LiveStep, on_bytes: Callable[[int], None] = lambda read_bytes: None
) -> Source:
    """Raises Damaged, StorageError if the step's records cannot be read or a file is missing."""
    step = store.step(live)
    step.check_sizes()
    extra = step.extra
    about = {"step": live.step, "attempt": live.attempt, "metrics": extra.stored_metrics, "extra": extra.stored_extra}
    return Source(step, step.intent.tree, about, on_bytes)


def export(source: Source, destination: str, form: str) -> int:
    """Write `source` to `destination` as `form`; return the bytes written.

    Raises UsageError if the format is unknown, the destination is taken or an array cannot be put into it, Damaged if
    something stored is not what was saved, StorageError if the destination cannot be written. Nothing is left then.
    """
    write = FORMATS.get(form)
    if write is None:
        raise UsageError(f"--format={form}: choose from {', '.join(FORMATS)}")
    arguments.path("DEST", destination)
    destination = os.path.abspath(os.path.expanduser(destination))
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists; export to a new name")
    folder, name = os.path.split(destination)
    partial = os.path.join(folder, f".{name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        os.makedirs(folder, exist_ok=True)
        written = write(source, partial)
        os.rename(partial, destination)
    except OSError as error:
        raise StorageError(f"export to {destination}: {error.strerror or error}") from error
    finally:
        if os.path.isdir(partial):
            shutil.rmtree(partial, ignore_errors=True)
        elif os.path.exists(partial):
            os.unlink(partial)
    return written


def _numpy(source: Source, folder: str) -> int:
    _distinct((leaf.name for leaf in source.tree.leaves if leaf.kind_stored), "numpy")
    os.mkdir(folder)
    index: list[dict[str, Any]] = []
    names = _file_names(source.tree.leaves)
    for leaf in source.tree.leaves:
        entry = {
            "path": leaf.path,
            "kind": leaf.kind,
            "shape": leaf.shape,
            "dtype": leaf.dtype,
            "value": leaf.value,
        }
        if leaf.kind_stored:
            entry |= {"file": names[leaf.name], "file_dtype": _npy_dtype(leaf).name}
            with open(os.path.join(folder, names[leaf.name]), "xb") as file:
                header = {"descr": _npy_dtype(leaf).str, "fortran_order": False, "shape": leaf.file_shape}
                np.lib.format.write_array_header_1_0(file, header)
        index.append(entry)
    written = 0
    for leaf, _, data in _slabs(source, source.tree.leaves):
        with open(os.path.join(folder, names[leaf.name]), "ab") as file:
            written += file.write(data.reshape(-1).view(np.uint8).data)
    with open(os.path.join(folder, "index.json"), "w") as text:
        json.dump({**source.about, "leaves": index}, text, indent=1)
    return written


def _file_names(leaves: Iterable[LeafSpec]) -> dict[str, str]:
    """A file for each array, by its leaf's name: called like it where a file can be, else numbered. No two are the
    same, not even on a file system that does not tell capitals from small letters."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for number, leaf in enumerate(leaves):
        if leaf.kind_stored:
            quoted = quote(leaf.name, safe=" ._-[]()=+,")
            numbered = (f"leaf-{number}{'+' * more}" for more in itertools.count())
            candidates = itertools.chain([quoted] if 0 < len(quoted) <= _NAME_MAX else [], numbered)
            names[leaf.name] = next(name for name in candidates if name.lower() not in taken) + ".npy"
            taken.add(names[leaf.name].removesuffix(".npy").lower())
    return names


def _distinct(names: Iterable[str], form: str, reserved: frozenset[str] = frozenset()) -> None:
    """Raises UsageError if a name is there twice, or is one that the format keeps for itself: a leaf would be lost."""
    seen = set(reserved)
    for name in names:
        if name in seen:
            why = "keeps this name for itself" if name in reserved else "would hold two leaves of this name"
            raise UsageError(f"{name}: {form} {why}; use --format=orbax")
        seen.add(name)


def _npy_dtype(leaf: LeafSpec) -> np.dtype[Any]:
    """The dtype of a leaf's `.npy`: its own, or unsigned integers of its width where numpy alone cannot read it."""
    dtype = numpy_dtype(leaf.stored_dtype or leaf.dtype)
    return dtype if dtype.char in _NATIVE_NPY else np.dtype(f"u{dtype.itemsize}")


def _slabs(source: Source, leaves: Iterable[LeafSpec]) -> Iterator[tuple[LeafSpec, Box, np.ndarray[Any, Any]]]:
    return stored_arrays.slabs(source.step, leaves, SLAB_BYTES, source.on_bytes)


def _safetensors(source: Source, path: str) -> int:
    stored = [leaf for leaf in source.tree.leaves if leaf.kind_stored]
    kept = [leaf for leaf in source.tree.leaves if not leaf.kind_stored]
    _distinct((leaf.name for leaf in stored), "safetensors", _SAFETENSORS_OWN)
    _distinct((leaf.label for leaf in kept), "safetensors' metadata")
    # Widest elements first, as the format's own library does, so that each array is aligned.
    stored.sort(key=lambda leaf: -numpy_dtype(leaf.stored_dtype or leaf.dtype).itemsize)
    values = {leaf.label: {"kind": leaf.kind, "value": leaf.value} for leaf in kept}
    about = {name: json.dumps(value) for name, value in {**source.about, "values": values}.items()}
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for leaf in stored:
        name = _SAFETENSORS.get(leaf.stored_dtype if leaf.kind == "key" else leaf.dtype)
        if name is None:
            raise UsageError(f"{leaf.label}: safetensors has no name for {leaf.dtype}; use --format=numpy or orbax")
        start, end = end, end + leaf_bytes(leaf)
        header[leaf.name] = {"dtype": name, "shape": leaf.file_shape, "data_offsets": [start, end]}
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    written = 0
    with open(path, "xb") as file:
        file.write(len(body).to_bytes(8, "little") + body)
        for _, _, data in _slabs(source, stored):
            written += file.write(data.reshape(-1).view(np.uint8).data)
    return written


def _orbax(source: Source, folder: str) -> int:
    external = next((leaf for leaf in source.tree.leaves if leaf.external), None)
    if external:
        raise UsageError(f"step {source.step.live.step} was adopted: it is an Orbax checkpoint already, where it was")
    return copy_state(source.step, folder, source.on_bytes)


def copy_state(step: StoredStep, folder: str, on_bytes: Callable[[int], None]) -> int:
    """Copy what is below a step's `state/` to `folder`, each file compared with the manifest, and then every chunk in
    the copy. Returns the bytes. Raises Damaged, StorageError, OSError."""
    written = 0
    for entry in step.manifest.files:
        if entry.path.startswith(keys.STATE):
            name = keys.check_key(entry.path, step.storage.url).removeprefix(keys.STATE)
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            written += _copy_file(step, entry, target, on_bytes)
    # A large file's checksum does not tell it from another save's (records.FileEntry); those of its chunks do.
    # Of adopted steps there are none.
    adopted = any(leaf.external for leaf in step.intent.tree.leaves)
    bad = {} if adopted else arrays.check(f"file://{folder}/", chunk_index.stored(step.manifest))
    if bad:
        step.judge([], sorted(bad))
        raise StorageError(f"{folder}: {len(bad)} chunks are not what was copied there: {min(bad.values())}")
    return written


def _copy_file(step: StoredStep, entry: FileEntry, target: str, on_bytes: Callable[[int], None]) -> int:
    """A large file goes through memory in pieces: those of adopted steps may be of any size."""
    with open(target, "xb") as file:
        if entry.bytes <= SLAB_BYTES:
            body = step.checked(entry)
            on_bytes(len(body))
            return file.write(body)
        checksum, count = 0, 0
        for piece in _pieces(step, entry):
            checksum, count = crc32c.crc32c(piece, checksum), count + file.write(piece)
            on_bytes(len(piece))
    if (count, f"{checksum:08x}") != (entry.bytes, entry.crc32c):
        step.check_measured([entry])
        where = f"{step.storage.url}/{step.id.key(entry.path)}"
        raise StorageError(f"{where}: read as something else than the store says that it is; try again")
    return count


def _pieces(step: StoredStep, entry: FileEntry) -> Iterator[bytes]:
    root, key = local_path(step.storage.url), step.id.key(entry.path)
    if root is None:
        yield from object_pieces(step.storage, key)
        return
    path = os.path.join(os.path.realpath(root), key)
    if os.path.realpath(path) != path:
        raise Damaged(f"{path}: behind a symbolic link; what is below a root may have none")
    with open(path, "rb") as source:
        while piece := source.read(_PIECE_BYTES):
            yield piece


FORMATS: dict[str, Callable[[Source, str], int]] = {"orbax": _orbax, "safetensors": _safetensors, "numpy": _numpy}

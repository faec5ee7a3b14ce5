"""The JSON files that Orbax leaves in a step, read as what they are documented to hold. Written by others: every one is
opened as a regular file and nothing else, and whatever is not as it should be is one clear error that names it."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from orchestrator.errors import Damaged, StorageError, UsageError
from orchestrator.storage.port import TooLarge
from orchestrator.storage.store_path import AnyPath, StorePath

_BYTES_MAX = 256 << 20  # a tree of a million leaves


class _File(msgspec.Struct, frozen=True):
    pass


class StepMetadata(_File, frozen=True):
    """`_CHECKPOINT_METADATA`. commit_timestamp_nsecs: since 1970; the bound is the year 2262."""

    custom_metadata: dict[str, Any] | None = None
    commit_timestamp_nsecs: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    item_handlers: Any = None

    def handler(self, item: str) -> str:
        """The class of an item's handler, as far as the step says; else ""."""
        given = self.item_handlers
        found = given.get(item) if isinstance(given, dict) else given
        return found if isinstance(found, str) else ""


class Key(_File, frozen=True):
    key: str | int
    key_type: int


class Value(_File, frozen=True):
    """skip_deserialize: of an array, it is in the `checkpoint` file of older versions of Orbax."""

    value_type: str
    skip_deserialize: bool = False


class Leaf(_File, frozen=True):
    key_metadata: tuple[Key, ...]
    value_metadata: Value

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(str(key.key) for key in self.key_metadata)


class TreeMetadata(_File, frozen=True):
    """`_METADATA`."""

    tree_metadata: dict[str, Leaf]
    use_zarr3: bool | None = None
    use_ocdbt: bool | None = None


class Extension(_File, frozen=True):
    random_key_impl: str | None = None


class ArrayMetadata(_File, frozen=True):
    param_name: str
    ext_metadata: Extension | None = None


class ArrayEntry(_File, frozen=True):
    array_metadata: ArrayMetadata


class ArrayMetadatas(_File, frozen=True):
    """`array_metadatas/process_N`."""

    array_metadatas: tuple[ArrayEntry, ...]


Kind = TypeVar("Kind")


def read(path: AnyPath, kind: type[Kind]) -> Kind:
    """The JSON file at `path`, as `kind`. Raises Damaged naming the file and the member, StorageError."""
    return parse(read_bytes(path), kind, str(path))


def parse(body: bytes, kind: type[Kind], where: str) -> Kind:
    """JSON as Python writes it (Orbax does): NaN and Infinity are numbers. Raises Damaged."""
    try:
        value = json.loads(body.decode())
        return msgspec.convert(value, kind)
    except RecursionError as error:
        raise Damaged(f"{where}: nested too deeply to be Orbax's") from error
    except (ValueError, msgspec.ValidationError) as error:  # not UTF-8, not JSON, or not of the kind
        raise Damaged(f"{where}: not what Orbax writes: {error}") from error


def read_bytes(path: AnyPath) -> bytes:
    """A regular file, whole. Raises Damaged for what is none, and does not wait for a pipe's other end."""
    if isinstance(path, StorePath):
        return _object(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise Damaged(f"{path}: not a regular file")
            if about.st_size > _BYTES_MAX:
                raise Damaged(f"{path}: {about.st_size} bytes; Orbax's are of at most {_BYTES_MAX}")
            return file.read()
    except IsADirectoryError as error:
        raise Damaged(f"{path}: a directory; expected a file") from error
    except OSError as error:
        raise _link(path) if path.is_symlink() else _unreadable(path, error) from error


def _object(path: StorePath) -> bytes:
    if path.is_dir():
        raise Damaged(f"{path}: a directory; expected a file")
    try:
        return path.read_bytes(_BYTES_MAX)
    except TooLarge as error:
        raise Damaged(f"{path}: {error.bytes} bytes; Orbax's are of at most {_BYTES_MAX}") from error
    except FileNotFoundError as error:
        raise StorageError(f"{path}: no such object") from error


def read_text(path: AnyPath) -> str:
    """Raises as `read_bytes`, and Damaged for bytes that are not UTF-8."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"{path}: not text: {error}") from error


@dataclass(frozen=True)
class _Entry:
    path: AnyPath
    is_dir: bool
    is_file: bool


def directories(directory: AnyPath, skip: frozenset[str]) -> dict[str, AnyPath]:
    """The directories in a directory of Orbax's, by name. Raises UsageError for a symbolic link, StorageError."""
    return {entry.path.name: entry.path for entry in _entries(directory, skip) if entry.is_dir}


def files_below(directory: AnyPath) -> dict[str, AnyPath]:
    """Every file below a directory of Orbax's, by its name there. Raises UsageError for a symbolic link or a special
    file: what it leads to is not the step's; StorageError."""
    found: dict[str, AnyPath] = {}
    for entry in _entries(directory):
        name = entry.path.name
        if entry.is_dir and not entry.is_file:
            found |= {f"{name}/{below}": each for below, each in files_below(entry.path).items()}
        elif entry.is_file and not entry.is_dir:
            found[name] = entry.path
        elif entry.is_file:  # as a store can have it
            raise UsageError(f"{entry.path}: an object, and a folder of others; move one elsewhere")
        else:
            raise UsageError(f"{entry.path}: neither a file nor a directory; move it elsewhere")
    return found


def _entries(directory: AnyPath, skip: frozenset[str] = frozenset()) -> list[_Entry]:
    if isinstance(directory, StorePath):
        try:
            there = [each for each in directory.iterdir() if each.name not in skip]
        except OSError as error:
            raise StorageError(f"{directory}: no such folder") from error
        return [_Entry(each, each.is_dir(), each.is_file()) for each in there]
    try:
        if directory.is_symlink():
            raise _link(directory)
        with os.scandir(directory) as entries:
            found = sorted((each for each in entries if each.name not in skip), key=lambda each: each.name)
    except OSError as error:
        raise _unreadable(directory, error) from error
    for entry in found:
        if entry.is_symlink():
            raise _link(directory / entry.name)
    return [
        _Entry(directory / each.name, each.is_dir(follow_symlinks=False), each.is_file(follow_symlinks=False))
        for each in found
    ]


def _link(path: AnyPath) -> UsageError:
    return UsageError(f"{path}: a symbolic link, which is not followed; put what it leads to in its place")


def _unreadable(path: AnyPath, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read: {error.strerror or error}")

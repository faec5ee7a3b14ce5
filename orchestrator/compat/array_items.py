"""Items of Orbax's that are one array: what ArraySave has written, and JaxRandomKeySave, a directory with a key's data
and JSON that says if it is typed.

Which implementation a key is of, Orbax does not write: it restores it as the one that is the default then.
"""

from __future__ import annotations

import msgspec

from orchestrator import arrays
from orchestrator.arrays.format import orbax_json
from orchestrator.errors import UsageError
from orchestrator.rules.records import LeafSpec
from orchestrator.storage.store_path import AnyPath

_HANDLER = "ArrayCheckpointHandler"
_ABOUT = "_metadata"
_JSON = "metadata"
_THREEFRY = "threefry2x32"
_WORDS = 2  # of a threefry key


class _Key(msgspec.Struct, frozen=True):
    typed: bool


def describe(directory: AnyPath, handler: str, item: str, name: str) -> LeafSpec | None:
    """The leaf that the item `name` in `directory` is, which will be `state/<item>` of an attempt; None if it is of
    another kind. handler: the class that the step names. Raises UsageError for a key of an implementation that cannot
    be told, Damaged."""
    if arrays.is_array(directory) or (arrays.is_tree(directory) and handler.endswith(f".{_HANDLER}")):
        return _array(directory, item, name)
    key = _key(directory)
    return _random_key(directory, key, item, name) if key else None


def _array(directory: AnyPath, item: str, name: str) -> LeafSpec:
    found = [arrays.describe_array(directory, item)] if arrays.is_array(directory) else arrays.describe(directory, item)
    if len(found) != 1 or not found[0].external:
        raise UsageError(f"{directory}: expected one array; got {len(found)} leaves")
    return msgspec.structs.replace(found[0], path=(name,))


def _key(directory: AnyPath) -> str | None:
    """The name of the key in an item's directory."""
    for path in directory.iterdir():
        about = directory / f"{path.name}{_ABOUT}" / _JSON
        is_one = path.is_dir() and (arrays.is_tree(path) or arrays.is_array(path))
        if is_one and about.is_file() and b'"typed"' in orbax_json.read_bytes(about):
            return path.name
    return None


def _random_key(directory: AnyPath, key: str, item: str, name: str) -> LeafSpec:
    typed = orbax_json.read(directory / f"{key}{_ABOUT}" / _JSON, _Key).typed
    leaf = _array(directory / key, f"{item}/{key}" if item else key, name)
    if not typed or leaf.kind == "key":
        return leaf
    if leaf.shape[-1:] != (_WORDS,) or leaf.dtype != "uint32":
        raise UsageError(
            f"{directory}: a typed PRNG key of {leaf.dtype}{list(leaf.shape)}, which is none of {_THREEFRY}; Orbax "
            "does not say which it is. Restore it with Orbax and save it here"
        )
    return msgspec.structs.replace(
        leaf,
        kind="key",
        shape=leaf.shape[:-1],
        dtype="key<fry>",
        stored_shape=leaf.shape,
        stored_dtype=leaf.dtype,
        value=_THREEFRY,
    )

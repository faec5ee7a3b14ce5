"""Items that Orbax's JaxRandomKeySave has written: a directory with the key's data, and JSON that says if it is typed.

Which implementation a key is of, Orbax does not write: it restores it as the one that is the default then.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator import arrays
from orchestrator.arrays.format import orbax_json
from orchestrator.errors import UsageError
from orchestrator.rules.records import LeafSpec

_ABOUT = "_metadata"
_JSON = "metadata"
_THREEFRY = "threefry2x32"
_WORDS = 2  # of a threefry key


class _Key(msgspec.Struct, frozen=True):
    typed: bool


def find(directory: Path) -> str | None:
    """The name of the key in an item's directory; None for an item of another kind."""
    for path in directory.iterdir():
        about = directory / f"{path.name}{_ABOUT}" / _JSON
        if arrays.is_tree(path) and about.is_file() and b'"typed"' in orbax_json.read_bytes(about):
            return path.name
    return None


def describe(directory: Path, key: str, item: str, name: str) -> LeafSpec:
    """The leaf of the key `key` in `directory`, which will be `state/<item>` of an attempt; the item `name` is the key
    itself. Raises UsageError for a key of an implementation that cannot be told, Damaged."""
    typed = orbax_json.read(directory / f"{key}{_ABOUT}" / _JSON, _Key).typed
    leaves = arrays.describe(directory / key, f"{item}/{key}" if item else key)
    if len(leaves) != 1 or leaves[0].kind not in ("array", "numpy"):
        raise UsageError(f"{directory / key}: expected one array, the data of a PRNG key; got {len(leaves)} leaves")
    (leaf,) = leaves
    plain = msgspec.structs.replace(leaf, path=(name,))
    if not typed or leaf.kind == "key":
        return plain
    if leaf.shape[-1:] != (_WORDS,) or leaf.dtype != "uint32":
        raise UsageError(
            f"{directory}: a typed PRNG key of {leaf.dtype}{list(leaf.shape)}, which is none of {_THREEFRY}; Orbax "
            "does not say which it is. Restore it with Orbax and save it here"
        )
    return msgspec.structs.replace(
        plain,
        kind="key",
        shape=leaf.shape[:-1],
        dtype="key<fry>",
        stored_shape=leaf.shape,
        stored_dtype=leaf.dtype,
        value=_THREEFRY,
    )

"""The files that make a directory of arrays an Orbax checkpoint, as Orbax 0.12.8 writes them.

Orbax's own handler takes about 50 microseconds a leaf for them, most of a save of a thousand small leaves.
tests/arrays/test_private_apis.py compares these with what Orbax's handler writes for the same tree.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import msgspec

# Private (orbax 0.12.8): the text of a sharding is in Orbax's format. tests/arrays/test_private_apis.py watches it.
from orbax.checkpoint._src.metadata import sharding as _sharding_metadata

from orchestrator.rules.records import LeafSpec

_SEQUENCE_KEY, _DICT_KEY = 1, 2
_VALUE_TYPES = {"array": "jax.Array", "key": "jax.Array", "numpy": "np.ndarray", "numpy_scalar": "np.ndarray"}
_EMPTY_TYPES: tuple[tuple[type, str], ...] = ((list, "List"), (tuple, "Tuple"), (dict, "Dict"))


def value_type(leaf: LeafSpec, value: Any, stored: bool) -> str:
    """Orbax's name for what a leaf is; `None` for what its files do not hold."""
    if leaf.kind == "empty" and not hasattr(value, "_fields"):
        return next((name for kind, name in _EMPTY_TYPES if isinstance(value, kind)), "None")
    if leaf.kind == "str":
        return "string"
    if not stored:
        return "None"
    return _VALUE_TYPES.get(leaf.kind, "scalar")


def tree_metadata(leaves: Iterable[LeafSpec], treedef: Any, types: Iterable[str]) -> bytes:
    """`_METADATA`."""
    described = {}
    for leaf, kinds, name in zip(leaves, _key_types(treedef), types, strict=True):
        value: dict[str, Any] = {"value_type": name, "skip_deserialize": name in _SKIPPED}
        if name == "jax.Array":
            value["write_shape"] = leaf.chunk
        keys = [{"key": key, "key_type": kind} for key, kind in zip(leaf.path, kinds, strict=True)]
        described[str(leaf.path)] = {"key_metadata": keys, "value_metadata": value}
    body = {
        "tree_metadata": described,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return msgspec.json.encode(body)


_SKIPPED = frozenset({"None", "List", "Tuple", "Dict"})


@functools.lru_cache(maxsize=8)
def _key_types(treedef: Any) -> list[tuple[int, ...]]:
    """Of each leaf's keys: whether it is a position or a name."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(
        jax.tree_util.tree_unflatten(treedef, list(range(treedef.num_leaves)))
    )
    positions = (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)
    return [tuple(_SEQUENCE_KEY if isinstance(key, positions) else _DICT_KEY for key in path) for path, _ in with_paths]


def array_metadatas(leaves: Iterable[LeafSpec]) -> bytes:
    """`array_metadatas/process_0`: chunk shapes, and which arrays are PRNG keys."""
    described = [
        {
            "array_metadata": {
                "param_name": leaf.name,
                "write_shape": leaf.chunk,
                "chunk_shape": leaf.chunk,
                "ext_metadata": {"random_key_impl": leaf.value} if leaf.kind == "key" else None,
            }
        }
        for leaf in leaves
    ]
    return msgspec.json.encode({"array_metadatas": described})


def shardings(named: Iterable[tuple[str, jax.sharding.Sharding]]) -> bytes:
    """`_sharding`: base64 of the leaf's name -> its sharding, for plain Orbax without a target."""
    text = _sharding_text()
    texts = ((name, text(sharding)) for name, sharding in named)
    return msgspec.json.encode({base64.b64encode(name.encode()).decode(): found for name, found in texts if found})


def _sharding_text() -> Callable[[jax.sharding.Sharding], str | None]:
    @functools.cache
    def text(sharding: jax.sharding.Sharding) -> str | None:
        described = _sharding_metadata.from_jax_sharding(sharding)
        return described.to_serialized_string() if described else None

    return text


def strings(named: Iterable[tuple[str, str]]) -> bytes:
    """`_strings.json`. Orbax reads it by JSON pointer (RFC 6901), in which a slash goes a level down."""
    root: dict[str, Any] = {}
    for name, value in named:
        *above, last = (part.replace("~1", "/").replace("~0", "~") for part in name.split("/"))
        node = root
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return msgspec.json.encode(root)

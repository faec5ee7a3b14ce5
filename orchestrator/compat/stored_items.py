"""What a step holds, in Orbax's terms, and what its items are restored into: the target that the args ask for,
completed by what was saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from orchestrator.arrays import inline_value, numpy_dtype, targets, tree_path
from orchestrator.arrays.format import orbax_api, orbax_json
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.compat.orbax_items import is_composite, kind_of, reject
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.errors import Mismatch, UsageError
from orchestrator.rules import matching
from orchestrator.rules.records import Json, LeafSpec, TreeSpec


@dataclass(frozen=True)
class StoredItems:
    """What a step holds, in Orbax's terms. `lists`: paths of the tree's lists and tuples. `extra`: our member of its
    extra JSON."""

    step: int
    leaves: tuple[LeafSpec, ...]
    lists: frozenset[tuple[str, ...]]
    single: bool
    extra: dict[str, Json]
    process_states: dict[int, bytes]

    @property
    def whole(self) -> bool:
        """Whether the saved tree is the item itself; else it has a subtree for each item."""
        return self.single and {leaf.path[:1] for leaf in self.leaves} != {(DEFAULT,)}

    @property
    def trees(self) -> tuple[str, ...]:
        return (DEFAULT,) if self.whole else tuple(dict.fromkeys(leaf.path[0] for leaf in self.leaves))

    @property
    def json(self) -> tuple[str, ...]:
        return tuple(self.extra.get("json", {}))

    def _below(self, name: str) -> tuple[list[LeafSpec], frozenset[tuple[str, ...]]]:
        if self.whole:
            return list(self.leaves), self.lists
        leaves = [msgspec.structs.replace(leaf, path=leaf.path[1:]) for leaf in self.leaves if leaf.path[0] == name]
        return leaves, frozenset(path[1:] for path in self.lists if path[:1] == (name,))

    def skeletons(self) -> Any:
        """Abstract arrays in the structure of what was saved; a Composite of them for several items."""
        return self.joined({name: skeleton(*self._below(name)) for name in self.trees})

    def joined(self, named: Mapping[str, Any]) -> Any:
        """Items by name, as Orbax gives them back: a single one, or a Composite."""
        return named[DEFAULT] if self.single else orbax_api.public("args").Composite(**named)

    def named(self, args: Any, where: str) -> dict[str, Any]:
        """The args of a restore by item; of all items if there are none. Raises UsageError if they are those of a
        single item and the step holds several, or the reverse."""
        if args is None:
            return dict.fromkeys([*self.trees, *self.json])
        if self.single == is_composite(args):
            kind = "a single, unnamed item" if self.single else f"the items {', '.join([*self.trees, *self.json])}"
            raise UsageError(f"{where}: the step holds {kind}; got {type(args).__name__}")
        return {DEFAULT: args} if self.single else dict(args.items())

    def target(self, name: str, args: Any, where: str) -> Any:
        """What to restore item `name` into. Raises Mismatch if it does not fit what was saved."""
        leaves, lists = self._below(name)
        like = target(args, name, leaves, lists)
        partial = bool(getattr(args, "partial_restore", False))
        matching.match(TreeSpec(leaves=tuple(leaves)), targets(like)[0], partial=partial, cast=True, where=where)
        return like


_METADATA = re.compile(r"state/(?:([^/]+)/)?_METADATA")
_SEQUENCE = 1  # Orbax's key type of positions in lists and tuples


def metadata_files(paths: Iterable[str]) -> list[str]:
    """Orbax's descriptions of trees, among an attempt's files."""
    return [path for path in paths if _METADATA.fullmatch(path)]


def lists_in(body: bytes, name: str) -> set[tuple[str, ...]]:
    """Paths of the lists and tuples that Orbax's `_METADATA` tells of; below its item, if it is one of several."""
    found = _METADATA.fullmatch(name)
    above = (found[1],) if found and found[1] else ()
    lists = set()
    for entry in orbax_json.parse(body, orbax_json.TreeMetadata, name).tree_metadata.values():
        keys = enumerate(entry.key_metadata)
        lists |= {(*above, *entry.path[:depth]) for depth, key in keys if key.key_type == _SEQUENCE}
    return lists


def target(args: Any, name: str, leaves: Sequence[LeafSpec], sequences: frozenset[tuple[str, ...]]) -> Any:
    """What to restore an item into: the args' own target, completed by what was saved. `leaves`: of this item, with
    paths below it; `sequences`: the paths of its lists."""
    if args is None:
        return skeleton(leaves, sequences)
    kind = kind_of(args, name)
    reject(args, name, {"strict": True, "support_layout": False, "transforms": None, "legacy_transform_fn": None})
    like = args.item if kind in ("tree", "pytree") else None
    restore_args = getattr(args, "restore_args", None)
    if like is None and restore_args is None:
        return skeleton(leaves, sequences)
    if like is None:
        like = jax.tree_util.tree_map_with_path(_saved(leaves), restore_args)
    if restore_args is not None:
        like = jax.tree.map(_placed, like, restore_args)
    fallback = getattr(args, "fallback_sharding", None)
    host = {leaf.path for leaf in leaves if leaf.kind in ("numpy", "numpy_scalar")}

    def complete(path: Any, leaf: Any) -> Any:
        return _as_target(leaf, fallback, numpy=tree_path(path) in host)

    return jax.tree_util.tree_map_with_path(complete, like, is_leaf=_is_metadata)


def _is_metadata(leaf: Any) -> bool:
    return type(leaf).__module__.partition(".")[0] == "orbax"


def _as_target(leaf: Any, fallback: Any, *, numpy: bool) -> Any:
    """Orbax's own metadata and abstract arrays stand for what they describe. `numpy`: it was saved from numpy; as in
    Orbax it comes back so, unless a sharding is asked for."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic) or not hasattr(leaf, "shape"):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding):
        sharding = fallback
    if sharding is None and numpy:
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _saved(leaves: Sequence[LeafSpec]) -> Any:
    by_path = {leaf.path: leaf for leaf in leaves}

    def find(path: Any, wanted: Any) -> Any:
        names = tree_path(path)
        leaf = by_path.get(names)
        if leaf is None:
            raise Mismatch("restore_args", [f"{'/'.join(names)}: not in the checkpoint"])
        return _leaf(leaf)

    return find


def _placed(leaf: Any, wanted: Any) -> Any:
    """A target leaf as Orbax's RestoreArgs or ArrayRestoreArgs ask for it."""
    if not hasattr(leaf, "shape"):
        return leaf
    dtype = getattr(wanted, "dtype", None) or leaf.dtype
    if getattr(wanted, "restore_type", None) is np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), leaf.shape)
    sharding = getattr(wanted, "sharding", None)
    if sharding is None and getattr(wanted, "mesh", None) is not None:
        sharding = jax.sharding.NamedSharding(wanted.mesh, wanted.mesh_axes)
    if isinstance(sharding, jax.sharding.Sharding):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
    return leaf if dtype == leaf.dtype else jax.ShapeDtypeStruct(leaf.shape, dtype)


def skeleton(leaves: Iterable[LeafSpec], sequences: frozenset[tuple[str, ...]]) -> Any:
    """A target for everything that was saved: nested dicts and lists of abstract arrays, numpy and Python values."""
    root: dict[str, Any] = {}
    for leaf in leaves:
        if not leaf.path:
            return _leaf(leaf)
        *above, last = leaf.path
        node = root
        for name in above:
            node = node.setdefault(name, {})
        node[last] = _leaf(leaf)
    return _with_lists(root, (), sequences)


def _with_lists(node: Any, path: tuple[str, ...], sequences: frozenset[tuple[str, ...]]) -> Any:
    if not isinstance(node, dict) or not node:
        return node
    inner = {name: _with_lists(each, (*path, name), sequences) for name, each in node.items()}
    return [inner[name] for name in sorted(inner, key=int)] if path in sequences else inner


@in_own_context
def _leaf(leaf: LeafSpec) -> Any:
    match leaf.kind:
        case "array":
            return jax.ShapeDtypeStruct(leaf.shape, numpy_dtype(leaf.dtype))
        case "key":
            return jax.eval_shape(lambda: jnp.broadcast_to(jax.random.key(0, impl=leaf.value), leaf.shape))
        case "numpy" | "numpy_scalar":
            return np.broadcast_to(np.zeros((), numpy_dtype(leaf.dtype)), leaf.shape)
    return inline_value(leaf)

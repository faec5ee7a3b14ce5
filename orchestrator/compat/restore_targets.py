"""What an item is restored into: the target that its args ask for, completed by what was saved; and what is made of it
once it is loaded (placeholders, other shapes, renamed leaves)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orchestrator.arrays import inline_value, numpy_dtype, targets, tree_path
from orchestrator.arrays.format import orbax_api
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.compat import transforms
from orchestrator.compat.orbax_items import kind_of, reject
from orchestrator.errors import Mismatch
from orchestrator.rules import matching
from orchestrator.rules.records import LeafSpec, TreeSpec

_Path = tuple[str, ...]
_Finish = Callable[[Any], Any] | None
_VALUES = (bool, int, float, complex, str, bytes)


@dataclass(frozen=True)
class ItemTarget:
    """like: what is to be loaded. finish: makes of that what the caller gets."""

    like: Any
    finish: Callable[[Any], Any] = lambda loaded: loaded


@dataclass(frozen=True)
class SavedItem:
    """leaves: with paths below the item. lists: paths of its lists and tuples. shardings: of its arrays, where they can
    be had in this process."""

    leaves: Sequence[LeafSpec]
    lists: frozenset[_Path]
    shardings: Mapping[_Path, jax.sharding.Sharding]

    def skeleton(self) -> Any:
        """A target for everything: nested dicts and lists of abstract arrays, numpy and Python values."""
        return _with_lists(nested({leaf.path: self.like(leaf) for leaf in self.leaves}), (), self.lists)

    def like(self, leaf: LeafSpec) -> Any:
        return _leaf(leaf, self.shardings.get(leaf.path))


@dataclass(frozen=True)
class _Piece:
    """A leaf of what the caller gets. saved: its path in the checkpoint. like: what it is loaded into. value: what it
    is without the checkpoint, where `saved` is None."""

    saved: _Path | None
    like: Any = None
    value: Any = None
    finish: _Finish = None


def item_target(args: Any, name: str, saved: SavedItem, where: str) -> ItemTarget:
    """What item `name` is restored into, of which `saved` is stored.

    As in Orbax, the item of a PyTreeRestore says the structure, and its restore_args what each leaf becomes; that of a
    StandardRestore says both. Raises Mismatch if they do not fit what was saved.
    """
    kind = kind_of(args, name) if args is not None else ""
    item = args.item if kind in ("tree", "pytree") else None
    restore_args = getattr(args, "restore_args", None)
    if item is None and restore_args is None:
        return ItemTarget(saved.skeleton())
    reject(args, name, {"legacy_transform_fn": None})
    rules = transforms.rules_of(args, name)
    asked = _Asked(kind, args, {path: value for path, value in _flat(restore_args)})
    by_path = {leaf.path: leaf for leaf in saved.leaves}
    tree = restore_args if item is None else item
    structure = jax.tree_util.tree_structure(tree, is_leaf=is_leaf)
    pieces, problems = [], []
    for path, value in _flat(tree):
        source, finish = transforms.source_of(path, rules)
        leaf = None if source is None else by_path.get(source)
        if source is not None and leaf is None:
            problems.append(f"{'/'.join(path) or '(root)'}: {_absent(source, by_path)}")
        elif leaf is None or value is orbax_api.PLACEHOLDER:
            pieces.append(_Piece(None, value=value))
        else:
            like, own = asked.like(saved, leaf, value, path)
            pieces.append(_Piece(leaf.path, like, finish=_then(own, finish)))
    if problems:
        raise Mismatch(where, problems)
    like = nested({piece.saved: piece.like for piece in pieces if piece.saved is not None})
    partial = bool(getattr(args, "partial_restore", False)) or rules is not None
    if not partial:  # a placeholder has the place of what was saved there, which makes the structure comparable
        places = zip(pieces, _flat(tree), strict=True)
        whole = [saved.like(by_path[path]) if piece.saved is None else piece.like for piece, (path, _) in places]
        expected = jax.tree_util.tree_unflatten(structure, whole)
    else:
        expected = like
    leaves = TreeSpec(leaves=tuple(saved.leaves))
    matching.match(leaves, targets(expected)[0], partial=partial, cast=True, where=where)
    if not partial and all(piece.saved is not None and piece.finish is None for piece in pieces):
        return ItemTarget(expected)
    return ItemTarget(like, lambda loaded: jax.tree_util.tree_unflatten(structure, _finished(pieces, loaded)))


def _flat(tree: Any) -> list[tuple[_Path, Any]]:
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [(tree_path(path), value) for path, value in found]


def is_leaf(value: Any) -> bool:
    """Placeholders, RestoreArgs and Orbax's descriptions of arrays."""
    return value is orbax_api.PLACEHOLDER or type(value).__module__.partition(".")[0] == "orbax"


def _absent(path: _Path, by_path: Mapping[_Path, LeafSpec]) -> str:
    below = sum(each[: len(path)] == path for each in by_path)
    return f"the checkpoint has {below} leaves below" if below else "not in the checkpoint"


def _finished(pieces: Sequence[_Piece], loaded: Any) -> list[Any]:
    values = []
    for piece in pieces:
        value = piece.value
        if piece.saved is not None:
            value = loaded
            for name in piece.saved:
                value = value[name]
        values.append(piece.finish(value) if piece.finish else value)
    return values


def nested(by_path: Mapping[_Path, Any]) -> Any:
    """A tree of dicts with each value at its path."""
    root: dict[str, Any] = {}
    for path, value in by_path.items():
        if not path:
            return value
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return root


def _then(first: _Finish, second: _Finish) -> _Finish:
    if first is None or second is None:
        return first or second
    return lambda value: second(first(value))


@dataclass(frozen=True)
class _Asked:
    """What args ask of each leaf. wanted: their RestoreArgs, by path."""

    kind: str
    args: Any
    wanted: Mapping[_Path, Any]

    def like(self, item: SavedItem, leaf: LeafSpec, value: Any, path: _Path) -> tuple[Any, _Finish]:
        """What `leaf` is loaded into, and what is then made of it. `value`: the item's, at `path`."""
        wanted, saved = self.wanted.get(path), item.like(leaf)
        fallback = getattr(self.args, "fallback_sharding", None)
        described = not _is_restore_args(value) and hasattr(value, "shape") and hasattr(value, "dtype")
        if wanted is None and self.kind != "pytree":
            if not described:
                return (value if value is None or isinstance(value, _VALUES) else saved), None
            if leaf.kind == "key" and tuple(value.shape) == leaf.stored_shape:
                return saved, None  # Orbax's description of a typed key is that of its data
            if isinstance(saved, bool | int | float | complex) and tuple(value.shape) == ():
                return _number_as(saved, value)
            numpy = leaf.kind in ("numpy", "numpy_scalar")
            like = _as_target(value, item.shardings.get(path) or fallback, numpy=numpy)
            return (like, None) if getattr(self.args, "strict", True) else _resizing(leaf, like)
        if not hasattr(saved, "shape"):
            return _converted(saved, wanted)
        shape, from_item = saved.shape, value if wanted is None and described else None
        for source in (from_item, wanted):
            shape = getattr(source, "global_shape", None) or getattr(source, "shape", None) or shape
        sharding = _sharding(wanted) or _sharding(from_item) or getattr(saved, "sharding", None) or fallback
        if leaf.kind == "key" and tuple(shape) == leaf.stored_shape:
            return saved, None
        dtype, kind = getattr(wanted, "dtype", None) or saved.dtype, getattr(wanted, "restore_type", None)
        if kind is np.ndarray or (isinstance(saved, np.ndarray) and kind is not jax.Array and sharding is None):
            like = np.broadcast_to(np.zeros((), dtype), tuple(shape))
        else:
            like = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
        if not getattr(wanted, "strict", True):
            return _resizing(leaf, like)
        return like, kind if kind in (int, float, bool) else None


def _is_restore_args(value: Any) -> bool:
    return type(value).__name__.endswith("RestoreArgs")


def _converted(saved: Any, wanted: Any) -> tuple[Any, _Finish]:
    """A Python value of the checkpoint as RestoreArgs ask for it."""
    kind, dtype = getattr(wanted, "restore_type", None), getattr(wanted, "dtype", None)
    if isinstance(saved, bool | int | float | complex) and kind is np.ndarray:
        return saved, lambda value: np.asarray(value, dtype)
    if isinstance(saved, bool | int | float | complex) and kind is jax.Array:
        sharding = _sharding(wanted)
        return saved, lambda value: _as_array(value, dtype, sharding)
    return saved, kind if kind in (int, float, bool, str) and saved is not None else None


def _number_as(saved: Any, value: Any) -> tuple[Any, _Finish]:
    """A Python number of the checkpoint, as an array if that is what the target describes."""
    if type(value).__name__ == "ScalarMetadata":
        return saved, None
    sharding = _sharding(value)
    if sharding is None:
        return saved, lambda number: np.asarray(number, value.dtype)
    return saved, lambda number: _as_array(number, value.dtype, sharding)


def _sharding(source: Any) -> jax.sharding.Sharding | None:
    sharding = getattr(source, "sharding", None)
    if sharding is None and getattr(source, "mesh", None) is not None:
        sharding = jax.sharding.NamedSharding(source.mesh, source.mesh_axes)
    if sharding is not None and hasattr(sharding, "to_jax_sharding"):  # Orbax's description of one
        sharding = sharding.to_jax_sharding()
    return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def _resizing(leaf: LeafSpec, like: Any) -> tuple[Any, _Finish]:
    """Without `strict` an array of another shape is cut off, or filled up with zeros."""
    shape = tuple(getattr(like, "shape", leaf.shape))
    if leaf.kind not in ("array", "numpy") or shape == tuple(leaf.shape) or len(shape) != len(leaf.shape):
        return like, None  # another rank is rejected when it is matched
    dtype, sharding = like.dtype, getattr(like, "sharding", None)

    def resized(value: Any) -> Any:
        whole, result = np.asarray(value), np.zeros(shape, dtype)
        common = tuple(slice(0, min(sizes)) for sizes in zip(shape, whole.shape, strict=True))
        result[common] = whole[common].astype(dtype)
        if isinstance(like, np.ndarray):
            return result
        return _placed(result, sharding)

    return _leaf(leaf), resized


def _as_array(value: Any, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Of the dtype that the caller's own settings give such a number, unless one is asked for."""
    return _placed(np.asarray(value, dtype or jax.dtypes.canonicalize_dtype(np.asarray(value).dtype)), sharding)


@in_own_context
def _placed(value: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _as_target(leaf: Any, fallback: Any, *, numpy: bool) -> Any:
    """Orbax's own metadata and abstract arrays stand for what they describe. `numpy`: it was saved from numpy; as in
    Orbax it comes back so, unless a sharding is asked for."""
    if isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return leaf
    sharding = _sharding(leaf) or fallback
    if sharding is None and numpy:
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _with_lists(node: Any, path: _Path, lists: frozenset[_Path]) -> Any:
    if not isinstance(node, dict) or not node:
        return node
    inner = {name: _with_lists(each, (*path, name), lists) for name, each in node.items()}
    return [inner[name] for name in sorted(inner, key=int)] if path in lists else inner


@in_own_context
def _leaf(leaf: LeafSpec, sharding: jax.sharding.Sharding | None = None) -> Any:
    match leaf.kind:
        case "array":
            return jax.ShapeDtypeStruct(leaf.shape, numpy_dtype(leaf.dtype), sharding=sharding)
        case "key":
            return jax.eval_shape(lambda: jnp.broadcast_to(jax.random.key(0, impl=leaf.value), leaf.shape))
        case "numpy" | "numpy_scalar":
            return np.broadcast_to(np.zeros((), numpy_dtype(leaf.dtype)), leaf.shape)
    return inline_value(leaf)

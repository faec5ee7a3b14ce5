"""Orbax's `args` and what they mean here. Told apart by their classes' names, so that Orbax need not be imported.

Items that are pytrees of arrays make up the saved state: the tree itself, or one subtree an item for a Composite. JSON
items, custom metadata and the item mode go into the step's extra JSON; iterators into each process's own bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from orchestrator.arrays.element_types import numpy_dtype
from orchestrator.arrays.format import orbax_json
from orchestrator.arrays.inline_values import inline_value
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.tree import targets, tree_path
from orchestrator.compat.adopt import EXTRA
from orchestrator.errors import Mismatch, UsageError
from orchestrator.rules import arguments, matching
from orchestrator.rules.records import Json, LeafSpec, TreeSpec
from orchestrator.run.orbax_steps import DEFAULT

# Class of the args, or of the handler that item_handlers names -> what it is.
_KINDS = {
    "tree": ("StandardSaveArgs", "StandardRestoreArgs", "StandardCheckpointHandler"),
    "pytree": ("PyTreeSaveArgs", "PyTreeRestoreArgs", "PyTreeCheckpointHandler"),
    "array": ("ArraySaveArgs", "ArrayRestoreArgs", "ArrayCheckpointHandler"),
    "key": ("JaxRandomKeySaveArgs", "JaxRandomKeyRestoreArgs", "JaxRandomKeyCheckpointHandler"),
    "json": ("JsonSaveArgs", "JsonRestoreArgs", "JsonCheckpointHandler"),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


def is_composite(args: Any) -> bool:
    return type(args).__name__ == "CompositeArgs"


def kind_of(args: Any, name: str) -> str:
    """tree, pytree, array, key, json or iterator. Raises UsageError naming the item and its args."""
    for kind in type(args).__mro__:
        if kind.__name__ in _KIND_OF:
            return _KIND_OF[kind.__name__]
        if kind.__module__.partition(".")[0] == "grain":
            return "iterator"
    raise UsageError(
        f"item {name!r}: {type(args).__name__} has a handler of its own, whose files no receipt would cover; "
        "save it with StandardSave, PyTreeSave, JsonSave or grain's CheckpointSave, or in Agent.save's process_state"
    )


@dataclass
class Saving:
    """What one save consists of. `single`: not a Composite."""

    state: Any = None
    single: bool = True
    json: dict[str, Json] = field(default_factory=dict)
    iterators: dict[str, str] = field(default_factory=dict)

    def extra(self, custom_metadata: Mapping[str, Json] | None, root_metadata: Mapping[str, Json]) -> dict[str, Json]:
        """Raises UsageError naming what is not plain JSON."""
        custom = {
            name: arguments.plain_json(f"custom_metadata[{name!r}]", value)
            for name, value in (custom_metadata or {}).items()
        }
        told = {"single": self.single, "json": self.json, "custom_metadata": custom}
        return {EXTRA: {**told, "root_metadata": dict(root_metadata)}}

    @property
    def process_state(self) -> bytes | None:
        return json.dumps(self.iterators).encode() if self.iterators else None


def saving(args: Any) -> Saving:
    """A save's args taken apart. Raises UsageError for what has no place here."""
    single = not is_composite(args)
    named = {DEFAULT: args} if single else {name: each for name, each in args.items() if each is not None}
    result, trees = Saving(single=single), {}
    for name, each in named.items():
        match kind_of(each, name):
            case "json":
                result.json[name] = arguments.plain_json(f"item {name!r}", each.item)
            case "iterator":
                result.iterators[name] = iterator_state(each.item)
            case _:
                _reject(each, name, {"save_args": None, "custom_metadata": None, "ocdbt_target_data_file_size": None})
                trees[name] = each.item
    if not trees:
        raise UsageError(
            f"items {', '.join(named)}: none is a pytree of arrays, and a step without arrays cannot be saved; "
            "add them to a save that has some"
        )
    alone = trees.get(DEFAULT) if single else None
    result.state = trees if alone is None or jax.tree_util.all_leaves([alone]) else alone
    return result


def _reject(args: Any, name: str, defaults: Mapping[str, Any]) -> None:
    for option, default in defaults.items():
        value = getattr(args, option, default)
        if value is not default and value != default:
            raise UsageError(
                f"item {name!r}: {type(args).__name__}({option}={value!r:.80}) is not supported; leave it out"
            )


def iterator_state(iterator: Any) -> str:
    """A grain iterator's position as text: DataLoader iterators give bytes, Dataset iterators a JSON value."""
    state = iterator.get_state()
    return state.decode() if isinstance(state, bytes) else json.dumps(state)


def set_iterator(iterator: Any, name: str, states: Mapping[int, bytes], process: int, count: int) -> Any:
    """Put a grain iterator where it was: this process's own state, or, on another number of processes, the one that
    all saving processes had in common. Raises UsageError where they differ."""
    texts = {index: json.loads(body).get(name) for index, body in states.items()}
    if process in texts and len(texts) == count:
        text = texts[process]
    else:
        distinct = set(texts.values())
        if len(distinct) != 1:
            raise UsageError(
                f"item {name!r}: {len(texts)} processes saved {len(distinct)} different positions, {count} restore; "
                "use as many processes, or a pipeline whose position is the same on all (see the Grain guide)"
            )
        text = distinct.pop()
    if text is None:
        raise UsageError(f"item {name!r}: not in the checkpoint")
    iterator.set_state(text.encode() if isinstance(iterator.get_state(), bytes) else json.loads(text))
    return iterator


# The older way: items without args, told apart by the handlers given to the manager.


def handler_kinds(handlers: Any) -> dict[str, str]:
    """Item name (DEFAULT for a single one) -> kind, of `item_handlers` or `checkpointers`. Raises UsageError for
    handlers of the user's own."""
    if handlers is None:
        return {}
    named = handlers if isinstance(handlers, Mapping) else {DEFAULT: handlers}
    return {name: kind_of(getattr(each, "handler", each), name) for name, each in named.items()}


def from_legacy(items: Any, kinds: Mapping[str, str], args: Any, direction: str) -> Any:
    """`ocp.args` for plain items. `args`: that module; `direction`: Save or Restore."""

    def wrap(name: str, item: Any) -> Any:
        kind = kinds.get(name, "tree")
        if kind == "iterator":
            raise UsageError(f"item {name!r}: give iterators as args=ocp.args.Composite({name}=grain...)")
        family = {"tree": "Standard", "pytree": "PyTree", "array": "Array", "key": "JaxRandomKey", "json": "Json"}[kind]
        return getattr(args, family + direction)(item)

    if kinds.keys() - {DEFAULT}:
        return args.Composite(**{name: wrap(name, item) for name, item in items.items()})
    return wrap(DEFAULT, items)


# Targets.


@dataclass(frozen=True)
class Saved:
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

    def skeleton(self, name: str) -> Any:
        return skeleton(*self._below(name))

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
    _reject(args, name, {"strict": True, "support_layout": False, "transforms": None, "legacy_transform_fn": None})
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

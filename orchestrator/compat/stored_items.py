"""What a step holds, in Orbax's terms, and what its items are restored into: the target that the args ask for,
completed by what was saved."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import msgspec

from orchestrator.arrays.format import orbax_api, orbax_json
from orchestrator.compat.orbax_items import is_composite
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.compat.restore_targets import ItemTarget, SavedItem, item_target
from orchestrator.errors import UsageError
from orchestrator.rules.records import Json, LeafSpec


@dataclass(frozen=True)
class StoredItems:
    """What a step holds, in Orbax's terms. `lists`: paths of the tree's lists and tuples. `extra`: our member of its
    extra JSON. `shardings`: by the leaf's name, of those that can be had in this process."""

    step: int
    leaves: tuple[LeafSpec, ...]
    lists: frozenset[tuple[str, ...]]
    single: bool
    extra: dict[str, Any]
    process_states: dict[int, bytes]
    shardings: Mapping[str, jax.sharding.Sharding] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the saved tree is the item itself; else it has a subtree for each item."""
        return self.single and {leaf.path[:1] for leaf in self.leaves} != {(DEFAULT,)}

    @property
    def trees(self) -> tuple[str, ...]:
        """The items of arrays. A step without any holds an empty tree in the place of an item that is none."""
        if self.whole:
            return (DEFAULT,)
        others = {*self.json, *self.own}
        return tuple(name for name in dict.fromkeys(leaf.path[0] for leaf in self.leaves) if name not in others)

    @property
    def json(self) -> tuple[str, ...]:
        return tuple(self.extra.get("json", {}))

    @property
    def json_values(self) -> dict[str, Json]:
        found: dict[str, Json] = self.extra.get("json", {})
        return found

    def json_file(self, name: str) -> str:
        """What the file of a JSON item is called in a directory of Orbax's."""
        files: dict[str, str] = self.extra.get("json_files", {})
        return files.get(name, "metadata")

    @property
    def own(self) -> tuple[str, ...]:
        """Items that each process has its own part of: iterators, and those with handlers of the user's own."""
        return tuple(dict.fromkeys(name for body in self.process_states.values() for name in own_states(body)))

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.trees, *self.json, *self.own)

    def is_custom(self, name: str) -> bool:
        """Whether it was saved by a handler of the user's own."""
        states = (own_states(body).get(name) for body in self.process_states.values())
        return any(isinstance(state, dict) for state in states)

    def _below(self, name: str) -> SavedItem:
        found, lists = self.leaves, self.lists
        if not self.whole:
            found = tuple(leaf for leaf in self.leaves if leaf.path[0] == name)
            lists = frozenset(path[1:] for path in self.lists if path[:1] == (name,))
        leaves, shardings = [], {}
        for leaf in found:
            path = leaf.path if self.whole else leaf.path[1:]
            leaves.append(msgspec.structs.replace(leaf, path=path))
            if leaf.name in self.shardings:
                shardings[path] = self.shardings[leaf.name]
        return SavedItem(leaves, lists, shardings)

    def described(self) -> dict[str, Any]:
        """Abstract arrays by item, in the structure of what was saved; None for items that are no trees."""
        return {name: self._below(name).skeleton() if name in self.trees else None for name in self.names}

    def skeletons(self) -> Any:
        """`described`, with Orbax's metadata of numbers and text in the place of their values, and what its metadata of
        a tree has beside it; a Composite for several items."""
        named = {name: _with_metadata(tree) for name, tree in self.described().items()}
        return self.joined(
            {
                name: ItemMetadata(tree) if isinstance(tree, dict | list | tuple) else tree
                for name, tree in named.items()
            }
        )

    def joined(self, named: Mapping[str, Any]) -> Any:
        """Items by name, as Orbax gives them back: a single one, or a Composite."""
        return named[DEFAULT] if self.single else orbax_api.public("args").Composite(**named)

    def named(self, args: Any, where: str) -> dict[str, Any]:
        """The args of a restore by item; of all items if there are none. Raises UsageError if they are those of a
        single item and the step holds several, or the reverse."""
        if args is None:
            found = dict.fromkeys([*self.trees, *self.json])
            if not found:
                raise UsageError(
                    f"{where}: of {', '.join(self.names) or 'no items'} only; say by args how to restore it"
                )
            return found
        if self.single == is_composite(args):
            kind = "a single, unnamed item" if self.single else f"the items {', '.join(self.names)}"
            raise UsageError(f"{where}: the step holds {kind}; got {type(args).__name__}")
        return {DEFAULT: args} if self.single else dict(args.items())

    def target(self, name: str, args: Any, where: str) -> ItemTarget:
        """What to restore item `name` into. Raises Mismatch if it does not fit what was saved."""
        return item_target(args, name, self._below(name), where)


def _with_metadata(tree: Any) -> Any:
    def described(path: tuple[Any, ...], leaf: Any) -> Any:
        if not isinstance(leaf, bool | int | float | complex | str):
            return leaf
        return orbax_api.value_metadata(".".join(str(orbax_api.key_name(key)) for key in path), leaf)

    return jax.tree_util.tree_map_with_path(described, tree)


def own_states(body: bytes) -> dict[str, Any]:
    """One process's own part of a step: item -> an iterator's text, or the files of a handler of the user's own. Empty
    for a native agent's."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@jax.tree_util.register_pytree_with_keys_class
class ItemMetadata(Mapping[Any, Any]):
    """Abstract arrays in the structure of what was saved: `tree`, and the same by key. A pytree, as Orbax's is."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.custom_metadata: Any = None

    def __getitem__(self, key: Any) -> Any:
        return self.tree[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tree)

    def __len__(self) -> int:
        return len(self.tree)

    def __repr__(self) -> str:
        return f"ItemMetadata({self.tree!r})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        with_keys, structure = jax.tree_util.tree_flatten_with_path(
            self.tree, is_leaf=lambda each: each is not self.tree
        )
        return [(path[0], value) for path, value in with_keys], structure

    @classmethod
    def tree_unflatten(cls, structure: Any, values: Any) -> ItemMetadata:
        return cls(jax.tree_util.tree_unflatten(structure, values))


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


_SHARDING = re.compile(r"state/(?:([^/]+)/)?_sharding")


def sharding_files(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if _SHARDING.fullmatch(path)]


def shardings_in(body: bytes, name: str) -> dict[str, jax.sharding.Sharding]:
    """By the leaf's name, below its item if the file is of one of several; those that this process's devices allow."""
    found = _SHARDING.fullmatch(name)
    above = f"{found[1]}." if found and found[1] else ""
    texts = {
        above + base64.b64decode(key).decode(): text
        for key, text in orbax_json.parse(body, dict[str, str], name).items()
    }
    made = {text: orbax_api.sharding_of(text) for text in set(texts.values())}
    return {key: sharding for key, text in texts.items() if (sharding := made[text]) is not None}

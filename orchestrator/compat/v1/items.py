"""The objects of a v1 checkpoint ("checkpointables") as items that are saved and restored here: pytrees, JSON, and what
a handler of the context's registry writes into files."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.format import orbax_api, orbax_v1
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.compat.restore_targets import is_leaf
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.v1 import settings
from orchestrator.errors import UsageError

AUTO = "AUTO"  # the checkpoint's own pytree, whatever it is called


class NoSuchItem(UsageError, KeyError):
    """The checkpoint holds no item of that name, or none that can be loaded so. Orbax raises KeyError."""


class Handled:
    """A handler of Orbax's v1 with the methods of an older one. `about`: the context that it runs in."""

    def __init__(self, handler: Any, about: Any) -> None:
        self._handler, self._about = handler, about
        self.handler_type = type(handler)

    def save(self, directory: Any, args: Any) -> None:
        async def whole() -> None:
            await (await self._handler.save(orbax_v1.ReadyPath(directory), args.item))

        with orbax_v1.within(self._about):
            asyncio.run(whole())

    def restore(self, directory: Any, args: Any) -> Any:
        async def whole() -> Any:
            return await (await self._handler.load(directory, args.item))

        with orbax_v1.within(self._about):
            return asyncio.run(whole())

    def metadata(self, directory: Any) -> Any:
        """What the handler says of its files; None where it cannot."""
        with orbax_v1.within(self._about):
            try:
                return asyncio.run(self._handler.metadata(directory))
            except Exception:  # the handler's: as in Orbax, it has nothing to say then
                return None


def to_save(given: Any, about: Any) -> Any:
    """The args of a save of `given`, objects by name. Raises UsageError for names and objects that cannot be saved, a
    KeyError for one that no handler is registered for."""
    if not isinstance(given, dict) or not given:
        raise UsageError(f"expected a dict of the objects to save by name, got {type(given).__name__}, {given!r:.80}")
    check_names(given)
    args = {}
    for name, value in given.items():
        if value is None:
            raise UsageError(f"{name!r}: None cannot be saved; leave it out")
        handler = orbax_v1.handler_for_save(about, name, value)
        if orbax_v1.is_tree_handler(handler):
            if not jax.tree.leaves(value):
                raise UsageError(f"{name!r}: a tree without a leaf cannot be saved; leave it out")
            args[name] = _tree_save(value, settings.storage(about))
        elif orbax_v1.is_json_handler(handler):
            args[name] = orbax_api.public("args").JsonSave(value)
        else:
            args[name] = orbax_v1.ItemArgs(value, Handled(handler, about))
    return orbax_api.public("args").Composite(**args)


def check_names(given: Mapping[str, Any]) -> None:
    for name in given:
        if not isinstance(name, str) or not name or name in orbax_v1.RESERVED or "/" in name:
            raise UsageError(f"{name!r} cannot be the name of an object; choose another")


def check_state(state: Any) -> None:
    """Raises UsageError naming a leaf that no v1 checkpoint holds."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not isinstance(leaf, jax.Array | np.ndarray | np.number | np.bool_ | int | float | bytes | str):
            where = jax.tree_util.keystr(path) or "(root)"
            raise UsageError(f"{where}: {type(leaf).__name__} cannot be saved; expected arrays, numbers or text")


def _tree_save(tree: Any, storage: settings.Storage) -> Any:
    made = orbax_api.public("SaveArgs")

    def one(path: Any, leaf: Any) -> Any:
        dtype, chunk_bytes, axes = storage(path, leaf)
        return made(dtype=dtype, chunk_byte_size=chunk_bytes, shard_axes=axes)

    return orbax_api.public("args").PyTreeSave(tree, save_args=jax.tree_util.tree_map_with_path(one, tree))


def to_load(stored: StoredItems, given: Mapping[str, Any], about: Any) -> dict[str, Any]:
    """The args of a restore of items by name, each into its abstract twin; None: as it was saved. Raises NoSuchItem."""
    missing = [name for name in given if name not in stored.names]
    if missing:
        raise NoSuchItem(f"step {stored.step}: no {', '.join(map(repr, missing))}; it holds {_names(stored)}")
    saved_by = stored.extra.get("items") or {}
    args: dict[str, Any] = {}
    for name, abstract in given.items():
        if name in stored.trees:
            args[name] = _tree_restore(abstract, about)
        elif stored.is_custom(name):
            handler = orbax_v1.handler_for_load(about, name, abstract, saved_by.get(name))
            if orbax_v1.is_tree_handler(handler):
                raise NoSuchItem(f"{name!r} was saved by {saved_by.get(name)}, which is not registered here")
            args[name] = orbax_v1.ItemArgs(abstract, Handled(handler, about))
        else:
            args[name] = None if name in stored.json else orbax_v1.ItemArgs(abstract, None)
    return args


def tree_name(stored: StoredItems, name: str | None) -> str:
    """The item that `name` means: AUTO is "state", or else the first pytree there is. Raises UsageError, which is also
    an InvalidLayoutError of Orbax's."""
    if name is not None and name != AUTO:
        check_names({name: None})
    if name in stored.trees:
        return str(name)
    if name in orbax_v1.STATES and (saved := next((each for each in orbax_v1.STATES if each in stored.trees), None)):
        return saved  # by another version
    found = sorted(stored.trees, key=lambda each: (each != orbax_v1.STATE, each))
    if found and (name == AUTO or (stored.single and name in (None, orbax_v1.STATE))):
        return found[0]
    raise NoSuchTree(f"step {stored.step}: no pytree {name!r}; it holds {_names(stored)}")


class NoSuchTree(UsageError, orbax_v1.InvalidLayoutError):  # type: ignore[misc,valid-type]
    """The checkpoint holds no pytree of that name."""


def _names(stored: StoredItems) -> str:
    return ", ".join("an unnamed item" if name == DEFAULT else name for name in stored.names) or "nothing"


def _tree_restore(abstract: Any, about: Any) -> Any:
    """Each leaf of `abstract` says by its type what it is loaded as."""
    if abstract is None:
        return None
    strict = not orbax_v1.options(about, "array").loading.enable_padding_and_truncation
    partial = bool(orbax_v1.options(about, "pytree").loading.partial_load)
    restore_args = jax.tree.map(lambda leaf: _leaf_args(leaf, strict), abstract, is_leaf=is_leaf)
    return orbax_api.public("args").PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)


def _leaf_args(leaf: Any, strict: bool) -> Any:
    if isinstance(leaf, type) or not hasattr(leaf, "dtype"):
        kind = leaf if isinstance(leaf, type) else type(leaf)
        return orbax_api.public("RestoreArgs")(restore_type=kind if kind in (int, float, bool, str) else None)
    if not hasattr(leaf, "sharding"):
        return orbax_api.public("RestoreArgs")(restore_type=np.ndarray, dtype=leaf.dtype)
    shape = None if leaf.shape is None else tuple(leaf.shape)
    made = orbax_api.public("ArrayRestoreArgs")
    return made(restore_type=jax.Array, dtype=leaf.dtype, sharding=leaf.sharding, global_shape=shape, strict=strict)


def abstract_of(given: Any) -> Any:
    """Orbax's description of a checkpoint stands for what it describes."""
    kinds = (orbax_v1.public("CheckpointMetadata"), orbax_v1.public("training", "CheckpointMetadata"))
    return given.metadata if isinstance(given, kinds) else given


def given_or_all(stored: StoredItems, given: Any) -> dict[str, Any]:
    """Abstract twins by name; of all there are if none are given. Raises UsageError for what is no dict of them."""
    given = abstract_of(given)
    if not given:
        return {name: None for name in stored.names if name in stored.trees + stored.json or stored.is_custom(name)}
    if not isinstance(given, dict):
        raise UsageError(f"abstract_checkpointables: expected a dict by name, got {type(given).__name__}")
    check_names(given)
    return given

"""Orbax's `args` and what they mean here: what a save consists of. Told apart by the names of their classes.

Items that are pytrees of arrays make up the saved state: the tree itself, or one subtree an item for a Composite. JSON
items, custom metadata and the item mode go into the step's extra JSON; iterators into each process's own bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from orchestrator.arrays.format import orbax_api
from orchestrator.compat.adopt import EXTRA
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.errors import UsageError
from orchestrator.rules import arguments
from orchestrator.rules.records import Json

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
class SaveContents:
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
        extra = {"single": self.single, "json": self.json, "custom_metadata": custom}
        return {EXTRA: {**extra, "root_metadata": dict(root_metadata)}}

    @property
    def process_state(self) -> bytes | None:
        return json.dumps(self.iterators).encode() if self.iterators else None


def contents(args: Any) -> SaveContents:
    """A save's args taken apart. Raises UsageError for what has no place here."""
    single = not is_composite(args)
    named = {DEFAULT: args} if single else {name: each for name, each in args.items() if each is not None}
    result, trees = SaveContents(single=single), {}
    for name, each in named.items():
        match kind_of(each, name):
            case "json":
                result.json[name] = arguments.plain_json(f"item {name!r}", each.item)
            case "iterator":
                result.iterators[name] = iterator_state(each.item)
            case _:
                reject(each, name, {"save_args": None, "custom_metadata": None, "ocdbt_target_data_file_size": None})
                trees[name] = each.item
    if not trees:
        raise UsageError(
            f"items {', '.join(named)}: none is a pytree of arrays, and a step without arrays cannot be saved; "
            "add them to a save that has some"
        )
    alone = trees.get(DEFAULT) if single else None
    result.state = trees if alone is None or jax.tree_util.all_leaves([alone]) else alone
    return result


def reject(args: Any, name: str, defaults: Mapping[str, Any]) -> None:
    """Raises UsageError naming an option of `args` that has another value than its default."""
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


def from_legacy(items: Any, kwargs: Any, args: Any, kinds: Mapping[str, str], direction: str) -> Any:
    """`args`, made from the older `items` where those are given. `direction`: Save or Restore."""
    if kwargs:
        raise UsageError("save_kwargs and restore_kwargs are not supported; use args=")
    if items is None:
        return args
    if args is not None or type(items).__name__.endswith("Args"):
        raise UsageError("give the args by name: args=ocp.args.StandardSave(...)")
    module = orbax_api.public("args")

    def wrap(name: str, item: Any) -> Any:
        kind = kinds.get(name, "tree")
        if kind == "iterator":
            raise UsageError(f"item {name!r}: give iterators as args=ocp.args.Composite({name}=grain...)")
        family = {"tree": "Standard", "pytree": "PyTree", "array": "Array", "key": "JaxRandomKey", "json": "Json"}[kind]
        return getattr(module, family + direction)(item)

    if kinds.keys() - {DEFAULT}:
        return module.Composite(**{name: wrap(name, item) for name, item in items.items()})
    return wrap(DEFAULT, items)

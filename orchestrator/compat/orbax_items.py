"""Orbax's `args` and what they mean here: what a save consists of. Told apart by the names of their classes.

Items that are pytrees of arrays make up the saved state: the tree itself, or one subtree an item for a Composite. JSON
items, custom metadata and the item mode go into the step's extra JSON; iterators into each process's own bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from orchestrator.arrays.format import orbax_api
from orchestrator.compat import custom_items
from orchestrator.compat.adopt import EXTRA
from orchestrator.compat.orbax_steps import DEFAULT
from orchestrator.compat.save_args import saved_as
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


def kind_of_handler(handler: type) -> str:
    """tree, pytree, array, key, json, or custom: one that saves or restores in its own way."""
    for kind in handler.__mro__:
        if kind.__name__ in _KIND_OF and kind.__module__.partition(".")[0] == "orbax":
            own = ("save", "restore", "async_save", "finalize")
            changed = any(getattr(handler, name, None) is not getattr(kind, name, None) for name in own)
            return "custom" if changed else _KIND_OF[kind.__name__]
    return "custom"


def kind_of(args: Any, name: str) -> str:
    """tree, pytree, array, key, json, iterator or custom. Raises UsageError naming the item and what is no args."""
    if any(kind.__module__.partition(".")[0] == "grain" for kind in type(args).__mro__):
        return "iterator"
    handler = orbax_api.registered_handler(args)
    if handler is not None:
        return kind_of_handler(handler)
    for kind in type(args).__mro__:
        if kind.__name__ in _KIND_OF:
            return _KIND_OF[kind.__name__]
        if kind.__name__ == "CheckpointArgs":
            return "custom"
    raise UsageError(f"item {name!r}: got {type(args).__name__}, expected args such as ocp.args.StandardSave(...)")


@dataclass
class SaveContents:
    """What one save consists of. `single`: not a Composite. `items`: name -> type of its handler. `custom`: files of
    handlers of the user's own, by item. json_files: JSON items whose file has another name than Orbax's usual one."""

    state: Any = None
    single: bool = True
    items: dict[str, str] = field(default_factory=dict)
    json: dict[str, Json] = field(default_factory=dict)
    json_files: dict[str, str] = field(default_factory=dict)
    iterators: dict[str, str] = field(default_factory=dict)
    custom: dict[str, custom_items.Files] = field(default_factory=dict)

    def extra(self, custom_metadata: Mapping[str, Json] | None, metrics: Json) -> dict[str, Json]:
        """`metrics`: all of them, where some are no numbers. Raises UsageError naming what is not plain JSON."""
        custom = {
            name: arguments.plain_json(f"custom_metadata[{name!r}]", value)
            for name, value in (custom_metadata or {}).items()
        }
        extra: dict[str, Json] = {"single": self.single, "json": self.json, "custom_metadata": custom}
        extra["items"] = dict(self.items)
        if self.json_files:
            extra["json_files"] = dict(self.json_files)
        if metrics is not None:
            extra["metrics"] = metrics
        return {EXTRA: extra}

    @property
    def process_state(self) -> bytes | None:
        own = {**self.iterators, **self.custom}
        return json.dumps(own).encode() if own else None


class HandlerFailed(Exception):
    """A handler of the user's own has raised `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Handlers(Protocol):
    """What is asked of the manager's handlers."""

    def handler(self, name: str, args: Any) -> Any:
        """Of an item with a handler of the user's own."""

    def json_file(self, name: str) -> str:
        """The file of a JSON item; '' for Orbax's usual one."""


def contents(args: Any, handlers: Handlers) -> SaveContents:
    """A save's args taken apart. A handler of the user's own saves here and now.
    Raises UsageError for what has no place here, HandlerFailed."""
    single = not is_composite(args)
    named = {DEFAULT: args} if single else {name: each for name, each in args.items() if each is not None}
    result, trees = SaveContents(single=single), {}
    for name, each in named.items():
        kind = kind_of(each, name)
        own = handlers.handler(name, each) if kind == "custom" else None
        made = getattr(own, "handler_type", type(own)) if own is not None else orbax_api.registered_handler(each)
        result.items[name] = f"{made.__module__}.{made.__qualname__}" if made else ""
        match kind:
            case "json":
                result.json[name] = arguments.plain_json(f"item {name!r}", each.item)
                if file := handlers.json_file(name):
                    result.json_files[name] = file
            case "iterator":
                result.iterators[name] = iterator_state(each.item)
            case "custom":
                result.custom[name] = _saved_by(own, name, each)
            case _:
                trees[name] = saved_as(each.item, each)
    if not trees:  # JSON or iterators alone; an agent saves no state without a leaf
        result.state = {next(iter(named), DEFAULT): {}}
        return result
    alone = trees.get(DEFAULT) if single else None
    result.state = trees if alone is None or jax.tree_util.all_leaves([alone]) else alone
    return result


def _saved_by(handler: Any, name: str, args: Any) -> custom_items.Files:
    try:
        return custom_items.save(handler, name, args)
    except UsageError:
        raise
    except Exception as error:  # the user's
        raise HandlerFailed(error) from error


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


def custom_files(name: str, states: Mapping[int, bytes], process: int) -> custom_items.Files:
    """The files that the handler of item `name` wrote, on all processes; where two wrote one, this process's."""
    found: custom_items.Files = {}
    for index in sorted(states, key=lambda index: index == process):
        files = json.loads(states[index]).get(name)
        found |= files if isinstance(files, dict) else {}
    return found


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

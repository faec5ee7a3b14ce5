"""Which handler each item of a manager has, as its `item_names`, `item_handlers`, `checkpointers` or `handler_registry`
say, and whether it manages a single, unnamed item or several by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.arrays.format import orbax_api
from orchestrator.compat import custom_items
from orchestrator.compat.orbax_items import is_composite, kind_of_handler
from orchestrator.compat.orbax_steps import DEFAULT, JSON_FILE
from orchestrator.errors import UsageError

_FAMILIES = {"tree": "Standard", "pytree": "PyTree", "array": "Array", "key": "JaxRandomKey", "json": "Json"}


@dataclass
class ItemHandlers:
    """handlers: by item (DEFAULT: the unnamed one). names: of all items there may be; None: any. single: None until the
    first save or restore has shown it. registry: of Orbax's, for its custom handlers."""

    handlers: dict[str, Any] = field(default_factory=dict)
    names: frozenset[str] | None = None
    single: bool | None = None
    registry: Any = None
    _json_files: dict[str, str] = field(default_factory=dict)  # by item

    @classmethod
    def of(
        cls, checkpointers: Any, item_names: Iterable[str] | None, item_handlers: Any, registry: Any
    ) -> ItemHandlers:
        """Raises UsageError for arguments that exclude each other."""
        given = {
            "checkpointers": checkpointers,
            "item_handlers": item_handlers,
            "item_names": item_names,
            "handler_registry": registry,
        }
        there = [name for name, value in given.items() if value]
        one = item_handlers is not None and not isinstance(item_handlers, Mapping)
        allowed = [[], ["item_handlers", "item_names"]] if not one else [[]]
        if len(there) > 1 and there not in allowed:
            raise UsageError(f"CheckpointManager: {' and '.join(there)} exclude each other; give one of them")
        found = checkpointers if item_handlers is None else item_handlers
        if found is None and item_names is None:
            return cls(registry=registry)
        named = dict(found or {}) if isinstance(found, Mapping) or found is None else {DEFAULT: found}
        handlers = {name: unwrapped(each) for name, each in named.items() if each is not None}
        names = frozenset([*named, *(item_names or ())])
        return cls(handlers, names, single=names == {DEFAULT})

    def check(self, args: Any, where: str) -> None:
        """Raises UsageError for args of one unnamed item where the manager has several, or the reverse; for an item
        that it does not have; and for args of another handler than the item's."""
        single = not is_composite(args)
        if self.single is not None and self.single != single:
            has = "a single, unnamed item" if self.single else "items by name"
            example = "args=ocp.args.StandardSave(...)" if self.single else "args=ocp.args.Composite(name=...)"
            raise UsageError(f"{where}: this manager has {has}, got {type(args).__name__}; give {example}")
        for name, each in [(DEFAULT, args)] if single else args.items():
            if self.names is not None and name not in self.names:
                raise UsageError(
                    f"{where}: no item {name!r}; this manager was made for {', '.join(sorted(self.names))}"
                )
            handler = self.handlers.get(name)
            expected = kind_of_handler(type(handler)) if handler is not None else None
            given = orbax_api.registered_handler(each)
            if expected and given and each is not None and kind_of_handler(given) != expected:
                raise UsageError(f"{where}: item {name!r}: {type(each).__name__} is not for {type(handler).__name__}")

    def handler(self, name: str, args: Any) -> Any:
        """The handler that saves or restores an item of another kind than ours. Args may bring their `own_handler`."""
        if getattr(args, "own_handler", None) is not None:
            return args.own_handler
        if name in self.handlers:
            return self.handlers[name]
        for item in (name, None):
            if self.registry is not None and self.registry.has(item, type(args)):
                return unwrapped(self.registry.get(item, type(args)))
        found = orbax_api.registered_handler(args)
        if found is None:
            raise UsageError(f"item {name!r}: no handler is known for {type(args).__name__}; give it as item_handlers=")
        self.handlers[name] = found()
        return self.handlers[name]

    def json_file(self, name: str) -> str:
        """The file that the item's JSON handler writes, '' for Orbax's usual one: the handler alone knows, so it writes
        one."""
        if name in self.handlers and name not in self._json_files:
            args = orbax_api.public("args").JsonSave({})
            (file,) = custom_items.save(self.handlers[name], name, args) or ("",)  # only process 0's writes
            self._json_files[name] = "" if file == JSON_FILE else file
        return self._json_files.get(name, "")

    def from_legacy(self, items: Any, kwargs: Any, args: Any, direction: str) -> Any:
        """`args`, made from the older `items` and `save_kwargs` or `restore_kwargs`. `direction`: Save or Restore."""
        if type(items).__name__.endswith("Args") or (args is not None and (items is not None or kwargs)):
            raise UsageError("give the args by name, and nothing else: args=ocp.args.StandardSave(...)")
        if args is not None or (items is None and not kwargs):
            return args
        several = bool(self.handlers.keys() - {DEFAULT}) or (not self.handlers and self.single is False)
        if not several:
            return self._wrap(DEFAULT, items, kwargs or {}, direction)
        names = dict.fromkeys([*(items or {}), *(kwargs or {})])
        named = {
            name: self._wrap(name, (items or {}).get(name), (kwargs or {}).get(name) or {}, direction) for name in names
        }
        return orbax_api.public("args").Composite(**named)

    def _wrap(self, name: str, item: Any, kwargs: Mapping[str, Any], direction: str) -> Any:
        handler = self.handlers.get(name)
        kind = "tree" if handler is None else kind_of_handler(type(handler))
        if kind in _FAMILIES:
            made = getattr(orbax_api.public("args"), _FAMILIES[kind] + direction)
        else:
            made = orbax_api.registered_args(handler, direction)
            if made is None:
                raise UsageError(f"item {name!r}: {type(handler).__name__} has no args; use register_with_handler")
        try:
            return made(**kwargs) if item is None and direction == "Restore" else made(item, **kwargs)
        except TypeError as error:
            raise UsageError(f"item {name!r}: {error}") from error


def unwrapped(handler: Any) -> Any:
    """The user's handler in a Checkpointer, or in what Orbax wraps handlers with that have no args of their own."""
    handler = getattr(handler, "handler", handler)
    while type(handler).__name__.endswith("CheckpointHandlerWrapper"):
        handler = handler._handler
    return handler

"""What `compat.v1` takes from Orbax's v1 API: names to hand through, the context in force, and which handler an item
has. Raises ImportError beside an Orbax that has no such API."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

import orbax.checkpoint as ocp

# Private: nothing public tells the context in force, nor which handler of a registry an object is for.
from orbax.checkpoint.experimental.v1._src.context import context as _contexts
from orbax.checkpoint.experimental.v1._src.handlers import registration as _registration

_v1 = ocp.v1
InvalidLayoutError: type[Exception] = _v1.errors.InvalidLayoutError
StepAlreadyExistsError: type[Exception] = _v1.training.errors.StepAlreadyExistsError
StepNotFoundError: type[Exception] = _v1.training.errors.StepNotFoundError
STATES = ("state", "pytree")  # what a single pytree is called since 0.12, and before
STATE = STATES[0] if hasattr(_v1, "save") else STATES[1]
RESERVED = frozenset({"metrics"})


def public(*names: str) -> Any:
    """`orbax.checkpoint.v1.<names>`. Raises AttributeError."""
    found = _v1
    for name in names:
        found = getattr(found, name)
    return found


def described(*names: str, path: Any, **about: Any) -> Any:
    """A description of a checkpoint of the class at `names`; since 0.12 those have its path."""
    made = public(*names)
    more = {"path": path} if "path" in inspect.signature(made).parameters else {}
    return made(**more, **about)


def context(otherwise: Any = None) -> Any:
    """The context that the caller is in; `otherwise`, or one of defaults, outside of any."""
    return _contexts.get_context(otherwise)


def options(about: Any, section: str) -> Any:
    """A part of the context's options, by its name since 0.12; None where this Orbax has none of the kind."""
    older = "async_options" if section == "asynchronous" else f"{section}_options"
    return getattr(about, section) if hasattr(about, section) else getattr(about, older, None)


def within(about: Any) -> AbstractContextManager[Any]:
    """`about` in force, which must not be entered twice."""
    return contextlib.nullcontext() if context() is about else about


def handler_for_save(about: Any, name: str, value: Any) -> Any:
    """The handler that the registry of context `about` has for an object. Raises a KeyError, as Orbax's, for none."""
    return _registration.resolve_handler_for_save(options(about, "checkpointables").registry, value, name=name)


def handler_for_load(about: Any, name: str, abstract: Any, saved_by: str | None) -> Any:
    """The handler that loads what handler `saved_by` wrote, as `abstract` asks. Raises a KeyError for none."""
    registry = options(about, "checkpointables").registry
    return _registration.resolve_handler_for_load(registry, abstract, name=name, handler_typestr=saved_by)


def is_tree_handler(handler: Any) -> bool:
    return isinstance(handler, _v1.handlers.PyTreeHandler)


def is_json_handler(handler: Any) -> bool:
    return isinstance(handler, _v1.handlers.JsonHandler)


class ReadyPath:
    """A directory that is there already, for handlers that wait for theirs to be made."""

    def __init__(self, path: Any) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path.name)

    def __truediv__(self, name: Any) -> ReadyPath:
        return ReadyPath(self.path / name)

    async def await_creation(self) -> Any:
        return self.path


class ItemArgs(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """An object, or its abstract twin, and the handler that saves or loads it."""

    def __init__(self, item: Any, own_handler: Any) -> None:
        self.item, self.own_handler = item, own_handler

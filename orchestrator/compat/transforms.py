"""The simple ones of Orbax's transforms: leaves that are renamed, changed one by one, or left as the item has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.errors import UsageError

Rules = tuple[Mapping[str, Any], bool]  # pattern -> Transform; whether leaves without one are the checkpoint's


def rules_of(args: Any, name: str) -> Rules | None:
    """The transforms of a PyTreeRestore; None without any. Raises UsageError naming one that is not supported."""
    given = getattr(args, "transforms", None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UsageError(f"item {name!r}: transforms={type(given).__name__}: give a dict of patterns")
    for pattern, transform in given.items():
        simple = type(transform).__name__ == "Transform" and getattr(transform, "multi_value_fn", None) is None
        if not isinstance(pattern, str) or not simple:
            raise UsageError(
                f"item {name!r}: transforms[{pattern!r}] takes several values; restore them, and combine them yourself"
            )
    return given, bool(getattr(args, "transforms_default_to_original", True))


def source_of(path: tuple[str, ...], rules: Rules | None) -> tuple[tuple[str, ...] | None, Callable[[Any], Any] | None]:
    """The path in the checkpoint of the leaf at `path`, None for one that is as the item has it; and what is made of
    its value."""
    if rules is None:
        return path, None
    given, default_to_original = rules
    key = "/".join(path)
    for pattern, transform in given.items():
        if found := re.fullmatch(pattern, key):
            if getattr(transform, "use_fallback", False):
                return (None, None) if default_to_original else (path, None)
            original = getattr(transform, "original_key", None)
            if original is None:
                return path, getattr(transform, "value_fn", None)
            text = original if isinstance(original, str) else "/".join(original)
            return tuple(found.expand(text).split("/")), getattr(transform, "value_fn", None)
    return (path, None) if default_to_original else (None, None)

"""Names that the v1 API had before: they warn as Orbax's do, and call the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def older_name(new: Callable[P, T]) -> Callable[P, T]:
    """Of a function or, within its class, of a method."""

    def old(*given: P.args, **named: P.kwargs) -> T:
        warnings.warn(f"Use `{new.__name__}` instead.", DeprecationWarning, stacklevel=2)
        return new(*given, **named)

    return old

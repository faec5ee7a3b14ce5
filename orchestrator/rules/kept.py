"""Results kept for the last few arguments, by which object they are: of what is worked out once for a tree of thousands
of leaves that every save and every restore of a job has. Pure."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

_KEPT = 4  # forms of state that a process has in turn

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")


def kept(function: Callable[[_Argument], _Result]) -> Callable[[_Argument], _Result]:
    """`function`, which is not called again for an object that it was lately called with, and did not raise for. Only
    for arguments that never change. They are kept, too: hold no data in them. Any thread."""
    known: deque[tuple[Any, Any]] = deque(maxlen=_KEPT)

    @functools.wraps(function)
    def once(argument: _Argument) -> _Result:
        for given, result in tuple(known):
            if given is argument:
                found: _Result = result
                return found
        result = function(argument)
        known.appendleft((argument, result))
        return result

    return once

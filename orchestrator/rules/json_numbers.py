"""Numbers that JSON has no word for (NaN and the infinities), as stored.

A metric is a number or one of three words: `"loss": "NaN"`. In a user's own JSON, where a text may stand anywhere, the
number is an object of its own: `{"$number": "Infinity"}`. Whatever of the user's looks like one gets one `$` more, so
that every value comes back as it was. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

Word = Literal["NaN", "Infinity", "-Infinity"]
StoredNumber = float | Word | None  # None: what earlier versions wrote of adopted ones; it is read as NaN

NUMBER = "$number"
_NUMBERS: dict[str, float] = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LOOKS_ALIKE = re.compile(r"\$+number")


def stored(number: float) -> float | Word:
    """A metric as it is written."""
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def stored_all(numbers: Mapping[str, float]) -> dict[str, StoredNumber]:
    return {name: stored(number) for name, number in numbers.items()}


def number(written: StoredNumber) -> float:
    """The metric that was written."""
    return math.nan if written is None else _NUMBERS[written] if isinstance(written, str) else written


def numbers(written: Mapping[str, StoredNumber]) -> dict[str, float]:
    return {name: number(each) for name, each in written.items()}


def pack(value: Any) -> Any:
    """A JSON value in which floats may be NaN or infinite, as one that JSON can hold. `unpack` gives it back."""
    if isinstance(value, float):
        return value if math.isfinite(value) else {NUMBER: stored(value)}
    if isinstance(value, dict) and len(value) == 1 and _LOOKS_ALIKE.fullmatch(next(iter(value))):
        return {f"${name}": pack(each) for name, each in value.items()}
    return _inside(value, pack)


def unpack(value: Any) -> Any:
    """What `pack` was given."""
    if isinstance(value, dict) and len(value) == 1:
        name, inner = next(iter(value.items()))
        if name == NUMBER and isinstance(inner, str) and inner in _NUMBERS:
            return _NUMBERS[inner]
        if name != NUMBER and _LOOKS_ALIKE.fullmatch(name):
            return {name[1:]: unpack(inner)}
    return _inside(value, unpack)


def _inside(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: change(each) for name, each in value.items()}
    return [change(each) for each in value] if isinstance(value, list) else value

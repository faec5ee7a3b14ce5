"""Python values that are kept in the tree spec itself, as exact text."""

from __future__ import annotations

import base64
from typing import Any

from orchestrator.errors import Damaged
from orchestrator.rules.records import LeafSpec


def inline_text(value: bool | int | float | complex) -> tuple[str, str]:
    """(kind, text) of a Python number in the tree spec. Inverse of `inline_value`."""
    found = text_of(value)
    assert found is not None
    return found


def text_of(value: Any) -> tuple[str, str] | None:
    """(kind, text) of a value kept in the tree spec; None if it is not one. Exact: floats as hex."""
    match value:
        case None:
            return "none", ""
        case bool():
            return "bool", str(value)
        case int():
            return "int", str(int(value))
        case float():
            return "float", float.hex(value)
        case complex():
            return "complex", f"{float.hex(value.real)} {float.hex(value.imag)}"
        case str():
            return "str", value
        case bytes():
            return "bytes", base64.b64encode(value).decode()
        case dict() | list() | tuple() if not value:
            return "empty", "tuple" if isinstance(value, tuple) else type(value).__name__
    return None


def inline_value(leaf: LeafSpec) -> Any:
    """The Python value of a leaf kept in the tree spec. Inverse of what `flatten` recorded."""
    match leaf.kind:
        case "none":
            return None
        case "bool":
            return leaf.value == "True"
        case "int":
            return int(leaf.value)
        case "float":
            return float.fromhex(leaf.value)
        case "complex":
            real, imag = leaf.value.split()
            return complex(float.fromhex(real), float.fromhex(imag))
        case "str":
            return leaf.value
        case "bytes":
            return base64.b64decode(leaf.value, validate=True)
        case "empty":
            return {"tuple": (), "list": []}.get(leaf.value, {})
    raise Damaged(f"{leaf.label}: unknown kind {leaf.kind!r} in the tree spec")


def fits_int64(value: int) -> bool:
    """Not by `in range`: of an int of a subclass (an IntEnum) that asks every number of the range, for ever."""
    return -(2**63) <= value < 2**63

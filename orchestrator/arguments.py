"""What people hand in, checked: each rule gives the plain value back, or raises UsageError with the argument's name,
what was got and what was wanted. Pure; changes nothing.
"""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.records import Json

STEP_MAX = 2**31 - 1  # JAX counts the steps of a preemption's sync point in 32 bits
SECONDS_MAX = 10**6  # every wait ends: clocks and locks overflow at less than infinity

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def refusal(name: str, value: object, wanted: str) -> UsageError:
    more = "; it is being traced: call this outside of jax.jit" if "Tracer" in type(value).__name__ else ""
    return UsageError(f"{name}={_short.repr(value)}: wanted {wanted}{more}")


def whole(name: str, value: object, least: int = 0, most: int | None = None) -> int:
    """Any kind of integer (numpy's, an array's without dimensions) as Python's own. No bool: that is a mistake."""
    number = _index(value)
    if number is None or number < least or (most is not None and number > most):
        raise refusal(name, value, f"a whole number of at least {least}" + (f", at most {most}" if most else ""))
    return number


def step(value: object) -> int:
    return whole("step", value, most=STEP_MAX)


def saved_step(value: object) -> int | None:
    """A step to look for, None for the newest. What no step can be is not found; what is no number is a mistake."""
    number = None if value is None else _index(value)
    if number is None and value is not None:
        raise refusal("step", value, "a whole number, or None for the newest")
    return number


def seconds(name: str, value: object, most: float = SECONDS_MAX) -> float:
    """A time: more than none, and not for ever. Of what is waited for, at most SECONDS_MAX."""
    number = _number(value)
    if number is None or isinstance(value, bool) or not 0 < number <= most:
        raise refusal(name, value, f"a positive number of seconds, at most {most}")
    return number


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):  # "no" would be true
        raise refusal(name, value, "True or False")


def choice(name: str, value: object, *choices: str) -> None:
    if not (isinstance(value, str) and value in choices):
        shown = ", ".join(map(repr, choices[:-1]))
        raise refusal(name, value, f"{shown} or {choices[-1]!r}")


def path(name: str, value: object) -> None:
    if not isinstance(value, str) and not hasattr(value, "__fspath__"):
        raise refusal(name, value, "a path")


def is_utf8(text: str) -> bool:
    """Whether it can be written as UTF-8: one with a lone surrogate, as in a file's name of other bytes, cannot."""
    return text == text.encode(errors="replace").decode()


def can(name: str, value: object, method: str, wanted: str) -> None:
    """`value` is an object with this method, and not the class or function that would make one."""
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise refusal(name, value, wanted)


def metrics(given: object) -> dict[str, float]:
    """Finite numbers only: JSON has no others, and a step without the metric is never the best, as NaN should be."""
    plain = {}
    for name, value in _mapping("metrics", given).items():
        number = _number(value)
        if number is None:
            raise refusal(f"metrics[{name!r}]", value, "a number")
        if math.isfinite(number):
            plain[name] = number
    return plain


def extra(given: object) -> dict[str, Json]:
    """A copy, as it will be read back."""
    plain = {}
    for name, value in _mapping("extra", given).items():
        try:
            text = json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            plain[name] = json.loads(text, object_pairs_hook=_without_twins)
        except (TypeError, ValueError, RecursionError) as error:
            raise refusal(f"extra[{name!r}]", value, f"plain JSON ({error})") from error
    return plain


def own_bytes(given: object) -> bytes | None:
    """A copy of a process's own state: the caller may overwrite it."""
    if given is not None and not isinstance(given, bytes | bytearray | memoryview):
        raise refusal("process_state", given, "bytes")
    return None if given is None else bytes(given)


def _mapping(name: str, given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise refusal(name, given, "a dict")
    for key in given:
        if not isinstance(key, str) or not is_utf8(key):
            raise refusal(f"a key of {name}", key, "text")
    return dict(given)


def _index(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # TypeError; of an array that is gone or not of this process, JAX's own
        return None


def _number(value: object) -> float | None:
    """None if it is none. Text is none, whatever it says."""
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except Exception:  # what float() raises; of an array that is gone or not of this process, JAX's own
        return None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON makes texts of numbers that are keys: 1 and "1" become one."""
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise ValueError("two keys are the same as text")
    return plain

"""What people hand in, checked: each rule gives the plain value back, or raises UsageError with the argument's name,
what was got and what was expected. Pure; changes nothing.
"""

from __future__ import annotations

import json
import operator
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.rules.records import Json

JSON_DEPTH_MAX = 100  # so that it can be read back however deep the stack of who reads it is
STEP_MAX = 2**31 - 1  # JAX counts the steps of a preemption's sync point in 32 bits
SECONDS_MAX = 10**6  # every wait ends: clocks and locks overflow at less than infinity

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{0,2}")  # of RFC 3986, but for one letter: that may be a drive
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def rejection(name: str, value: object, expected: str) -> UsageError:
    more = "; it is being traced: call this outside of jax.jit" if "Tracer" in type(value).__name__ else ""
    return UsageError(f"{name}={_short.repr(value)}: expected {expected}{more}")


def whole(name: str, value: object, least: int = 0, most: int | None = None) -> int:
    """Any kind of integer (numpy's, an array's without dimensions) as Python's own. No bool: that is a mistake."""
    number = _index(value)
    if number is None or number < least or (most is not None and number > most):
        raise rejection(name, value, f"a whole number of at least {least}" + (f", at most {most}" if most else ""))
    return number


def step(value: object) -> int:
    return whole("step", value, most=STEP_MAX)


def saved_step(value: object) -> int | None:
    """A step to look for, None for the newest. What no step can be is not found; what is no number is a mistake."""
    number = None if value is None else _index(value)
    if number is None and value is not None:
        raise rejection("step", value, "a whole number, or None for the newest")
    return number


def seconds(name: str, value: object, most: float = SECONDS_MAX) -> float:
    """A time: more than none, and not for ever. Of what is waited for, at most SECONDS_MAX."""
    number = _number(value)
    if number is None or isinstance(value, bool) or not 0 < number <= most:
        raise rejection(name, value, f"a positive number of seconds, at most {most}")
    return number


def share(name: str, value: object) -> None:
    number = _number(value)
    if number is None or not 0 <= number < 1:
        raise rejection(name, value, "a share: at least 0, less than 1")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):  # "no" would be true
        raise rejection(name, value, "True or False")


def choice(name: str, value: object, *choices: str) -> None:
    if not (isinstance(value, str) and value in choices):
        others = ", ".join(map(repr, choices[:-1]))
        raise rejection(name, value, f"{others} or {choices[-1]!r}")


def path(name: str, value: object) -> None:
    """A path on this machine. A URL is one, too, for an operating system: `gs://bucket/x` would be made below the
    working directory, as `gs:/bucket/x`, and nobody would find it."""
    if not isinstance(value, str) and not hasattr(value, "__fspath__"):
        raise rejection(name, value, "a path")
    if scheme := _SCHEME.match(str(value)):
        raise UsageError(
            f"{name}={_short.repr(str(value))}: expected a path on this machine, got one that begins with {scheme[0]}; "
            "what belongs in a bucket is written here and copied (gcloud storage cp -r); "
            "for a file that is really called so, put ./ before it"
        )


def is_utf8(text: str) -> bool:
    """Whether it can be written as UTF-8: one with a lone surrogate, as in a file's name of other bytes, cannot."""
    return text == text.encode(errors="replace").decode()


def can(name: str, value: object, method: str, expected: str) -> None:
    """`value` is an object with this method, and not the class or function that would make one."""
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise rejection(name, value, expected)


def metrics(given: object) -> dict[str, float]:
    """Numbers of any kind, NaN and the infinities too: they are facts about training."""
    plain = {}
    for name, value in _mapping("metrics", given).items():
        number = _number(value)
        if number is None:
            raise rejection(f"metrics[{name!r}]", value, "a number")
        plain[name] = number
    return plain


def extra(given: object) -> dict[str, Json]:
    return {name: plain_json(f"extra[{name!r}]", value) for name, value in _mapping("extra", given).items()}


def plain_json(name: str, value: object) -> Json:
    """A copy, as it will be read back: numbers may be NaN or infinite, a scalar of numpy's becomes Python's own."""
    try:
        text = json.dumps(value, default=_scalar, ensure_ascii=False).encode()
        copy: Json = json.loads(text, object_pairs_hook=_without_twins)
        _check_depth(copy)
    except (TypeError, ValueError, RecursionError) as error:
        raise rejection(name, value, f"plain JSON ({error})") from error
    return copy


def own_bytes(given: object) -> bytes | None:
    """A copy of a process's own state: the caller may overwrite it."""
    if given is not None and not isinstance(given, bytes | bytearray | memoryview):
        raise rejection("process_state", given, "bytes")
    return None if given is None else bytes(given)


def _mapping(name: str, given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise rejection(name, given, "a dict")
    for key in given:
        if not isinstance(key, str) or not is_utf8(key):
            raise rejection(f"a key of {name}", key, "text")
    return dict(given)


def _index(value: object) -> int | None:
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":  # an index to numpy 2.0
            return None
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


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(JSON_DEPTH_MAX):
        level = [inner for each in level for inner in _members(each)]
    if level:
        raise ValueError(f"nested more than {JSON_DEPTH_MAX} deep")


def _members(value: Json) -> Iterable[Json]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _scalar(value: object) -> object:
    """A scalar of numpy's as Python's own number: `json` calls this for what it does not know. An array is none, though
    it may hold one number only, and a time is none, though numpy may give it out as one."""
    scalar = hasattr(value, "item") and hasattr(value, "dtype") and not hasattr(value, "__setitem__")
    number = value.item() if scalar and value.dtype.kind not in "mM" else None  # type: ignore[attr-defined]
    if not isinstance(number, bool | int | float):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return number


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON makes texts of numbers that are keys: 1 and "1" become one."""
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise ValueError("two keys are the same as text")
    return plain

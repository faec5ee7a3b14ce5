"""Metrics as Orbax takes them, trees of anything that JSON has: what policies see of them, the numbers, by flat names.

A name inside a tree is an RFC 6901 pointer (`/eval/loss`); so is a flat name that begins with a slash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.rules import arguments
from orchestrator.rules.records import Json


def split(given: Mapping[str, Any] | None) -> tuple[dict[str, float] | None, Json]:
    """The numbers among metrics, by flat names, and all of them as JSON, None where the numbers are all there is."""
    if given is None:
        return None, None
    plain = arguments.plain_json("metrics", dict(given))
    assert isinstance(plain, dict)
    numbers = dict(_numbers(plain))
    return numbers, None if joined(numbers) == plain else plain


def _numbers(metrics: Mapping[str, Json]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from (("/" + _escaped(name) + _below(inner), number) for inner, number in _numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield ("/" + _escaped(name) if name.startswith("/") else name), value


def _below(name: str) -> str:
    return name if name.startswith("/") else "/" + _escaped(name)


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def joined(numbers: Mapping[str, float]) -> dict[str, Any]:
    """The tree that `split` took apart."""
    root: dict[str, Any] = {}
    for name, number in numbers.items():
        *above, last = parts(name)
        node = root
        for part in above:
            node = node.setdefault(part, {})
        node[last] = number
    return root


def parts(name: str) -> list[str]:
    if not name.startswith("/"):
        return [name]
    return [part.replace("~1", "/").replace("~0", "~") for part in name[1:].split("/")]

"""Which files of a held step are where. Pure.

Files have numbers: 0 is the manifest, then come its files, in its order. So what a host has of a step of thousands of
processes is a few digits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from orchestrator.rules import keys
from orchestrator.rules.records import Manifest

Value = TypeVar("Value")
_WRITER = re.compile(rf"{keys.STATE}ocdbt\.process_([0-9]+)/")


def names(manifest: Manifest) -> tuple[str, ...]:
    """Of a step's files, by number."""
    return (keys.MANIFEST, *(entry.path for entry in manifest.files))


def writer_of(name: str) -> int:
    """The process that wrote a file, by its name: process 0, where that names none."""
    if found := _WRITER.match(name):
        return int(found[1])
    if group := keys.group_of(name):
        return group[0]
    if name.startswith((keys.RECEIPTS, keys.PROCESS)):
        return keys.process_of(name)
    return 0


def lacking(manifest: Manifest, had: Iterable[Collection[int]]) -> str:
    """The first file that none has; '' if each is somewhere: only then is the step a candidate."""
    found = set().union(*had)
    return next((name for number, name in enumerate(names(manifest)) if number not in found), "")


def spread(holders: Sequence[Value], reader: int) -> list[Value]:
    """In which order reader number `reader` asks those that have the same files: not all begin with the same one."""
    at = reader % len(holders) if holders else 0
    return [*holders[at:], *holders[:at]]


def spans(numbers: Collection[int]) -> str:
    """As text, for a message: `0,3-17,20`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


def numbers(text: str, count: int) -> frozenset[int]:
    """What `spans` was made of, as far as it is below `count`: it comes from another process."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found.update(range(int(first), min(int(last or first), count - 1) + 1))
    return frozenset(found)

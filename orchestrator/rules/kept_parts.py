"""Parts of records and their JSON: each encoded, decoded and compared once for all records of a job that have it. Pure.

All saves of a job have one and the same tree, of which each process writes the same regions. With thousands of leaves,
taking those to pieces costs more than all else that is done with a record.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

_KEPT = 4
_TEXT_BYTES_MAX = 16 << 20  # of a part that is kept for the next record

_Part = TypeVar("_Part")


class KeptPart(Generic[_Part]):
    """The field `name`, of type `kind`, of one kind of record. identity: the object that tells whether it is the same;
    it never changes. Any thread."""

    def __init__(self, name: str, kind: Any, identity: Callable[[_Part], object] = lambda part: part) -> None:
        self.name, self._identity = name, identity
        self._decoder = msgspec.json.Decoder(kind)
        self._kept_part = functools.lru_cache(maxsize=_KEPT)(self._part)
        self._texts: deque[tuple[object, bytes]] = deque(maxlen=_KEPT)
        self._equal: deque[tuple[object, object]] = deque(maxlen=_KEPT)

    def text_of(self, part: _Part) -> bytes:
        """Its JSON."""
        same = self._identity(part)
        for known, text in tuple(self._texts):
            if known is same:
                return text
        text = msgspec.json.encode(part)
        self._texts.appendleft((same, text))
        return text

    def part_of(self, text: bytes) -> _Part:
        """The same object for the same text as lately. Raises what msgspec does."""
        return self._kept_part(text) if len(text) <= _TEXT_BYTES_MAX else self._part(text)

    def _part(self, text: bytes) -> _Part:
        try:
            part: _Part = self._decoder.decode(text)
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(f"{self.name}: {error}") from error
        return part

    def are_equal(self, one: _Part, other: _Part) -> bool:
        """As `==`, which is not asked again for two that were equal lately."""
        pair = self._identity(one), self._identity(other)
        if any(pair[0] is first and pair[1] is second for first, second in tuple(self._equal)):
            return True
        if one != other:
            return False
        self._equal.appendleft(pair)
        return True

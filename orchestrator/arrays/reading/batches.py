"""Items in batches of bounded size."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class _Sized(Protocol):
    @property
    def bytes(self) -> int: ...


Item = TypeVar("Item", bound=_Sized)


def batches(items: Iterable[Item], most_bytes: int, most_items: int = sys.maxsize) -> Iterator[list[Item]]:
    """In order, each of at most so many bytes and items; a larger item comes alone."""
    batch: list[Item] = []
    total = 0
    for item in items:
        if batch and (total + item.bytes > most_bytes or len(batch) >= most_items):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += item.bytes
    if batch:
        yield batch

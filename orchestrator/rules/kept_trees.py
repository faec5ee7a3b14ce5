"""Tree specs and their JSON: each encoded, decoded and compared once, however many records of a job hold it. Pure.

The intents of all saves of a job have one and the same tree. With thousands of leaves, taking it to pieces costs more
than all else that is done with a record.
"""

from __future__ import annotations

import functools
from collections import deque

import msgspec

from orchestrator.rules.kept import kept
from orchestrator.rules.records import LeafSpec, TreeSpec

_TEXT_BYTES_MAX = 16 << 20  # of a tree that is kept for the next record
_DECODER = msgspec.json.Decoder(TreeSpec)
_equal: deque[tuple[tuple[LeafSpec, ...], tuple[LeafSpec, ...]]] = deque(maxlen=4)


def text_of(tree: TreeSpec) -> bytes:
    """Its JSON."""
    return _text(tree.leaves)


@kept
def _text(leaves: tuple[LeafSpec, ...]) -> bytes:
    return msgspec.json.encode(TreeSpec(leaves=leaves))


def tree_of(text: bytes) -> TreeSpec:
    """The same object for the same text as lately. Raises what msgspec does."""
    return _kept_tree(text) if len(text) <= _TEXT_BYTES_MAX else _tree(text)


def _tree(text: bytes) -> TreeSpec:
    try:
        return _DECODER.decode(text)
    except msgspec.ValidationError as error:
        raise msgspec.ValidationError(f"tree: {error}") from error


_kept_tree = functools.lru_cache(maxsize=4)(_tree)


def are_equal(one: TreeSpec, other: TreeSpec) -> bool:
    """As `==`, which is not asked again for two trees that were equal lately."""
    if any(one.leaves is first and other.leaves is second for first, second in tuple(_equal)):
        return True
    if one != other:
        return False
    _equal.appendleft((one.leaves, other.leaves))
    return True

"""What differs between two committed steps, of one run or of two: by fingerprint where both have one, else by reading.

Holds the leaves of one batch at a time. Needs no devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from orchestrator.arrays import ReadRequest
from orchestrator.errors import OrchestratorError, StepRetired, Unavailable
from orchestrator.rules.matching import brief
from orchestrator.rules.records import LeafSpec, LiveStep
from orchestrator.rules.restore_cost import leaf_bytes
from orchestrator.run import stored_arrays
from orchestrator.run.journal_store import JournalStore

_BATCH_BYTES = 256 << 20
_BLOCK = 1 << 20  # elements compared at once

Path = tuple[str, ...]
State = Literal["equal", "differs", "other type", "only in a", "only in b", "unreadable"]
Pair = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | OrchestratorError
Means = Literal["fingerprint", "reading", "tree spec"]


@dataclass(frozen=True)
class LeafComparison:
    """One leaf. `a`, `b`: its type on either side, '' where it is not. `by`: what was compared. `elements`: how many
    differ, and `largest`: the greatest absolute difference (NaN where one side has no number); None where nobody has
    read them. problem: what kept it from being compared, where it is `unreadable`."""

    leaf: str
    a: str
    b: str
    state: State
    by: Means
    elements: int | None = None
    largest: float | None = None
    problem: OrchestratorError | None = None


class Side:
    """One committed step, opened for comparing. Raises Damaged if its records are: without them there is no leaf."""

    def __init__(self, store: JournalStore, live: LiveStep) -> None:
        self._stored = store.step(live)
        self.leaves: dict[Path, LeafSpec] = {leaf.path: leaf for leaf in self._stored.intent.tree.leaves}
        self.fingerprints = self._stored.manifest.fingerprints

    def read(self, paths: list[Path], on_bytes: Callable[[int], None]) -> list[np.ndarray[Any, Any]]:
        loads = [ReadRequest(self.leaves[path]) for path in paths]
        return [np.asarray(value) for value in stored_arrays.load(self._stored, loads, on_bytes)]


def compare(
    a: Side, b: Side, *, measure: bool = False, on_bytes: Callable[[int], None] = lambda read_bytes: None
) -> list[LeafComparison]:
    """Every leaf of either side, in a's order. `measure`: read the arrays that differ, for how many elements and how
    much. A leaf that cannot be read does not keep the others from being compared. Raises StepRetired,
    Unavailable where the store does not answer at all."""
    paths = [*a.leaves, *(path for path in b.leaves if path not in a.leaves)]
    found = {path: _by_record(a, b, path) for path in paths}
    to_read = [
        path
        for path, leaf in found.items()
        if leaf is None or (measure and leaf.by == "fingerprint" and leaf.state == "differs")
    ]
    for batch in _batches(a, to_read):
        for path, sides in _read(a, b, batch, on_bytes):
            known = found[path] or LeafComparison(a.leaves[path].label, *_types(a, b, path), "unreadable", "reading")
            if isinstance(sides, OrchestratorError):  # fingerprints know that it differs, just not how much
                found[path] = replace(known, problem=sides, state="unreadable")
            else:
                found[path] = _by_reading(a.leaves[path], b.leaves[path], *sides, measure, found[path])
    return [leaf for leaf in found.values() if leaf is not None]


def _read(a: Side, b: Side, paths: list[Path], on_bytes: Callable[[int], None]) -> Iterator[tuple[Path, Pair]]:
    """Both sides of each leaf, or what keeps it from being read. If one of a batch fails, each is read alone."""
    try:
        yield from zip(paths, zip(a.read(paths, on_bytes), b.read(paths, on_bytes), strict=True), strict=True)
    except StepRetired:
        raise
    except OrchestratorError as error:
        if isinstance(error, Unavailable) and error.waited:  # nobody answers: each leaf would wait as long again
            raise
        if len(paths) == 1:
            yield paths[0], error
            return
        for path in paths:
            yield from _read(a, b, [path], on_bytes)


def _types(a: Side, b: Side, path: Path) -> tuple[str, str]:
    return _type(a.leaves.get(path)), _type(b.leaves.get(path))


def _by_record(a: Side, b: Side, path: Path) -> LeafComparison | None:
    """What follows from the records alone; None if the arrays must be read."""
    one, other = a.leaves.get(path), b.leaves.get(path)
    compared = LeafComparison("/".join(path) or "(root)", *_types(a, b, path), "equal", "tree spec")
    if one is None or other is None:
        return replace(compared, state="only in a" if one else "only in b")
    if (one.kind, one.shape, one.dtype) != (other.kind, other.shape, other.dtype):
        return replace(compared, state="other type")
    if not one.in_store:
        return replace(compared, state="equal" if one.value == other.value else "differs")
    fingerprints = a.fingerprints.get(one.name), b.fingerprints.get(other.name)
    if None in fingerprints:
        return None
    return replace(compared, state="equal" if fingerprints[0] == fingerprints[1] else "differs", by="fingerprint")


def _by_reading(
    one: LeafSpec,
    other: LeafSpec,
    left: np.ndarray[Any, Any],
    right: np.ndarray[Any, Any],
    measure: bool,
    known: LeafComparison | None,
) -> LeafComparison:
    same = left.tobytes() == right.tobytes()
    by = known.by if known else "reading"
    compared = LeafComparison(one.label, _type(one), _type(other), "equal" if same else "differs", by)
    if same or not measure:
        return compared
    elements, largest = _measured(left.reshape(-1), right.reshape(-1))
    return replace(compared, elements=elements, largest=largest)


def _measured(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> tuple[int, float]:
    """(elements whose bits differ, greatest absolute difference), block by block."""
    wide = np.complex128 if left.dtype.kind == "c" else np.float64
    item = left.dtype.itemsize
    count, largest = 0, 0.0
    for start in range(0, left.size, _BLOCK):
        one, other = left[start : start + _BLOCK], right[start : start + _BLOCK]
        bits = [np.frombuffer(side.tobytes(), np.uint8).reshape(-1, item) for side in (one, other)]
        changed = (bits[0] != bits[1]).any(axis=1)
        count += int(changed.sum())
        if changed.any():
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.abs(one[changed].astype(wide) - other[changed].astype(wide))
            largest = float(np.maximum(largest, gap.max()))  # NaN wins: there is no greatest difference then
    return count, largest


def _batches(side: Side, paths: list[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    held = 0
    for path in paths:
        leaf = side.leaves[path]
        if batch and held + leaf_bytes(leaf) > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(path)
        held += leaf_bytes(leaf)
    if batch:
        yield batch


def _type(leaf: LeafSpec | None) -> str:
    return brief(leaf.kind, leaf.shape, leaf.dtype) if leaf else ""

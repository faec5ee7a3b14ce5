"""Who holds which leaf of a state that several processes save together. Pure.

A leaf is either on the devices of certain processes (all of them, or those of a pipeline stage), which write it; or
every process has its own copy: Python values, numpy arrays, arrays and keys on its own devices. Of those, process 0's
is stored. A process that has an array on its own devices only cannot tell which of the two it is, so all go by process
0's account. That is in the intent (`Held`); each process compares it with how it sees its own leaves, and rejects the
save where the two contradict.

    on process 0                          on process p                                 it is
    no array, or on devices of 0 alone    no array, or on devices of p alone           each one's own: 0's is stored
    no array, or on devices of 0 alone    on devices of 0 alone                        process 0's
    on devices of the processes S         on devices of S                              S's, which may be p alone
    anything else                                                                      rejected, by name
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import crc32c as crc32c_library
import msgspec

from orchestrator.errors import UsageError
from orchestrator.rules import chunk_index, zarr_chunks
from orchestrator.rules.boxes import whole_box
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.records import Box, Held, Intent, LeafSpec, Receipt, crc32c

Ranges = tuple[tuple[int, int], ...]  # half-open, ascending
View = Ranges | None  # how a process sees a leaf: on whose devices it is; None: it is no array of JAX
_NAMED = 5  # leaves or hosts that a message names
_COMPARED_BYTES = 4
_NOT_COMPARED = bytes(_COMPARED_BYTES)


def ranges(processes: Iterable[int]) -> Ranges:
    """Numbers of processes as ranges."""
    found: list[tuple[int, int]] = []
    for process in sorted(set(processes)):
        if found and found[-1][1] == process:
            found[-1] = (found[-1][0], process + 1)
        else:
            found.append((process, process + 1))
    return tuple(found)


def alone(process: int) -> Ranges:
    return ((process, process + 1),)


def includes(by: Ranges, process: int) -> bool:
    return any(first <= process < end for first, end in by)


def held(leaves: Sequence[LeafSpec], views: Sequence[View]) -> tuple[Held, ...]:
    """Process 0's account: how it sees its leaves, in runs of equal ones."""
    each = [
        (None, _unusual(leaf)) if view in (None, alone(0)) else (view, None)
        for leaf, view in zip(leaves, views, strict=True)
    ]
    return tuple(Held(sum(1 for _ in same), *key) for key, same in itertools.groupby(each))


def _unusual(leaf: LeafSpec) -> tuple[int, ...] | None:
    if not leaf.in_store or leaf.chunk == usual_chunk(leaf.file_shape, leaf.stored_dtype or leaf.dtype):
        return None
    return leaf.chunk


def each_of(held: Iterable[Held]) -> list[Held]:
    """One for each leaf."""
    return [run for run in held for _ in range(run.leaves)]


@functools.lru_cache(maxsize=16)
def name(held: tuple[Held, ...]) -> str:
    """The account's name in receipts; '' for a job of one process."""
    return crc32c(msgspec.json.encode(held)) if held else ""


def check_views(held: Sequence[Held], leaves: Sequence[LeafSpec], views: Sequence[View], process: int) -> None:
    """Raises UsageError naming the leaves that `process` sees in a way that contradicts process 0's account."""
    runs = each_of(held)
    if len(runs) != len(leaves):
        raise UsageError(f"process 0 saves a state of {len(runs)} leaves, process {process} one of {len(leaves)}")
    lines = []
    for leaf, view, run in zip(leaves, views, runs, strict=True):
        fits = view in (None, alone(process), alone(0)) if run.by is None else view == run.by
        if not fits:
            lines.append(f"{leaf.label}: {_seen(run.by, 0)}, {_seen(view, process)}")
    if lines:
        more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        raise UsageError(
            f"{'; '.join(lines[:_NAMED])}{more}. All processes must give a leaf on the same devices, or each its own"
        )


def _seen(by: View, process: int) -> str:
    where = "as its own" if by in (None, alone(process)) else f"on devices of {label_of(by or ())}"
    return f"process {process} has it {where}"


def label_of(by: Ranges) -> str:
    """`process 1`, `processes 0, 2-5`."""
    parts = [f"{first}" if end == first + 1 else f"{first}-{end - 1}" for first, end in by]
    more = ", ..." if len(parts) > _NAMED else ""
    one = len(by) == 1 and by[0][1] == by[0][0] + 1
    return f"process{'' if one else 'es'} {', '.join(parts[:_NAMED])}{more}"


def check(intent: Intent) -> None:
    """Check that an intent's `held` may be used. Raises ValueError."""
    if not intent.held:
        return
    check_runs(intent.held, intent.process_count)
    if sum(run.leaves for run in intent.held) != len(intent.tree.leaves):
        raise ValueError(f"held: not as many leaves as the tree's {len(intent.tree.leaves)}")


def check_runs(held: Sequence[Held], process_count: int) -> None:
    """Check an account by itself, whatever its number of leaves. Raises ValueError."""
    for run in held:
        if run.leaves < 1:
            raise ValueError(f"held: a run of {run.leaves} leaves, expected one or more")
        bounds = [bound for pair in run.by or () for bound in pair]
        if bounds != sorted(set(bounds)) or not all(0 <= bound <= process_count for bound in bounds):
            raise ValueError(f"held: {run.by!r:.100}, expected ranges of {process_count} processes")
        if any(size < 1 for size in run.chunk or ()):
            raise ValueError(f"held: chunks of {run.chunk!r:.100}")


def why_missing(run: Held | None, receipts: Mapping[int, Receipt], leaf: LeafSpec) -> str:
    """Which processes should have written more of a leaf that is not covered."""
    if run is None:
        return ""
    by = alone(0) if run.by is None else run.by
    idle = [
        f"process {process} ({receipt.host})"
        for process, receipt in sorted(receipts.items())
        if includes(by, process) and leaf.name not in receipt.boxes
    ]
    silent = f"; nothing of it came from {_few(idle)}" if idle else ""
    return f"; it is on devices of {label_of(by)}{silent}"


def _few(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more


# Leaves of which each process has its own copy: are the copies equal?


@dataclass(frozen=True)
class Cut:
    """How process 0 stores its own copy of leaves of one form. form: what a digest covers of it. boxes: the chunks, in
    order. suffixes: the ends of their keys. whole: it is one chunk."""

    form: bytes
    chunk_bytes: int
    boxes: tuple[Box, ...]
    suffixes: tuple[str, ...]

    @property
    def whole(self) -> bool:
        return len(self.boxes) == 1


def cut(leaf: LeafSpec, run: Held) -> Cut:
    """For a leaf that the array store holds. Cached by form."""
    return _cut(leaf.shape, leaf.file_shape, leaf.dtype, leaf.stored_dtype, run.chunk)


@functools.lru_cache(maxsize=256)
def _cut(
    shape: tuple[int, ...], stored: tuple[int, ...], dtype: str, stored_dtype: str, chunk: tuple[int, ...] | None
) -> Cut:
    given = (
        chunk and len(chunk) == len(stored) and not any(size % part for size, part in zip(stored, chunk, strict=True))
    )
    used = chunk if chunk and given else usual_chunk(stored, stored_dtype or dtype)
    boxes = tuple(zarr_chunks.cut(whole_box(stored), used))
    chunk_bytes = math.prod(used) * ITEM_BYTES[stored_dtype or dtype]
    return Cut(f"{dtype}{shape}".encode(), chunk_bytes, boxes, tuple(zarr_chunks.suffix(box, used) for box in boxes))


def usual_chunk(stored: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The chunk shape of an array on the host."""
    return zarr_chunks.chunk_shape(stored, ITEM_BYTES[dtype])


def digest(leaf: LeafSpec) -> bytes:
    """For a value that is in the tree spec, and in no file."""
    return _digest((leaf.dtype + str(leaf.shape) if leaf.kind_stored else f"{leaf.kind} {leaf.value}").encode())


def digest_of_chunks(form: bytes, checksums: Iterable[str]) -> bytes:
    """For a leaf's value, from `Cut.form` and the CRC-32C of each chunk's stored bytes, in hex."""
    return _digest(form + "".join(checksums).encode())


def _digest(parts: bytes) -> bytes:
    found: bytes = crc32c_library.crc32c(parts).to_bytes(_COMPARED_BYTES, "big")
    return found if found != _NOT_COMPARED else b"\1" * _COMPARED_BYTES


@dataclass(frozen=True)
class Difference:
    """A leaf whose value on these processes differs from process 0's."""

    leaf: LeafSpec
    processes: tuple[int, ...]


def differences(intent: Intent, receipts: Mapping[int, Receipt]) -> list[Difference]:
    """The leaves of which every process has its own copy, and not all are equal. All receipts are in."""
    compared = {process: receipt.own for process, receipt in sorted(receipts.items()) if receipt.own}
    if not compared or 0 not in receipts:
        return []
    stored = chunk_index.checksums([receipts[0]])
    leaves = [(leaf, run) for leaf, run in zip(intent.tree.leaves, each_of(intent.held), strict=True) if run.by is None]
    ours = b"".join(_of_stored(leaf, run, stored) for leaf, run in leaves)
    wrong: dict[int, list[int]] = {}
    for process, own in compared.items():
        if own == ours or len(own) != len(ours):
            continue
        for number, first in enumerate(range(0, len(ours), _COMPARED_BYTES)):
            theirs = own[first : first + _COMPARED_BYTES]
            if _NOT_COMPARED != theirs != ours[first : first + _COMPARED_BYTES]:
                wrong.setdefault(number, []).append(process)
    return [Difference(leaves[number][0], tuple(processes)) for number, processes in sorted(wrong.items())]


def _of_stored(leaf: LeafSpec, run: Held, stored: Mapping[str, str]) -> bytes:
    if not leaf.in_store:
        return digest(leaf)
    how, name = cut(leaf, run), leaf.name
    return digest_of_chunks(how.form, [stored.get(name + suffix, "") for suffix in how.suffixes])


def not_compared() -> bytes:
    """In place of a digest: this process has no copy of its own, or has not compared it in this save."""
    return _NOT_COMPARED


def lines(found: Sequence[Difference], receipts: Mapping[int, Receipt]) -> list[str]:
    """Messages about leaves that differ, grouped by their hosts; the first few groups."""
    together: dict[tuple[int, ...], list[str]] = {}
    for one in found:
        together.setdefault(one.processes, []).append(one.leaf.label)
    texts = []
    for processes, labels in list(together.items())[:_NAMED]:
        others = _few([f"process {process} ({receipts[process].host})" for process in processes])
        have = "has other values" if len(processes) == 1 else "have other values"
        stored = f"process 0 ({receipts[0].host}), whose are stored"
        texts.append(f"{_few(labels)}: hosts disagree: {others} {have} than {stored}")
    if len(together) > _NAMED:
        texts.append("and more leaves on other hosts")
    if texts:
        texts[-1] += "; keep what belongs to one host in process_state (docs/concepts.md)"
    return texts

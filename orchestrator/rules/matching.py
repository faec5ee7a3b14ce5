"""What a restore will read: matching a target tree against the saved one, before any array is touched. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from orchestrator.errors import Mismatch
from orchestrator.rules.records import STORED_KINDS, LeafSpec, TreeSpec


class TargetLeaf(msgspec.Struct, frozen=True, gc=False):
    """What the caller expects at a path: kind as in LeafSpec, and for stored kinds the shape and dtype. held: the dtype
    that JAX would use instead in this process (64 bits without x64); '' where it is the same."""

    path: tuple[str, ...]
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    held: str = ""

    @property
    def label(self) -> str:
        return "/".join(self.path) or "(root)"

    @property
    def number(self) -> str:
        """As LeafSpec.number."""
        return LeafSpec(path=self.path, kind=self.kind, shape=self.shape, dtype=self.dtype).number


_KINDS = {"array": "jax.Array", "numpy": "numpy array", "numpy_scalar": "numpy scalar", "key": "PRNG key"}
_SHORT = {"bfloat16": "bf16", "bool": "bool"}


def brief(kind: str, shape: Sequence[int], dtype: str) -> str:
    """`f32[8,4]` for arrays, `int` for a Python value."""
    if kind not in STORED_KINDS:
        return {"none": "None", "empty": "an empty container"}.get(kind, kind)
    short = _SHORT.get(dtype, dtype)
    for long, letter in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if short.startswith(long):
            short = letter + short[len(long) :]
            break
    return f"{short}[{','.join(map(str, shape))}]"


def match(
    saved: TreeSpec, target: Sequence[TargetLeaf], *, partial: bool = False, cast: bool = False, where: str = ""
) -> list[LeafSpec | None]:
    """The saved leaf for each target leaf, in the target's order (None for an empty node that needs none).

    `partial` lets the target leave saved leaves out; `cast` allows any other dtype, except to or from PRNG keys. Raises
    Mismatch with every problem, each with path, expected and got.
    """
    by_path = {leaf.path: leaf for leaf in saved.leaves}
    problems: list[str] = []
    chosen: list[LeafSpec | None] = []
    for leaf in target:
        found = by_path.get(leaf.path)
        problem = _problem(leaf, found, by_path, cast)
        if problem:
            problems.append(f"{leaf.label}: {problem}")
        chosen.append(found)
    if not partial:
        expected = {leaf.path for leaf in target}
        problems += [
            f"{leaf.label}: checkpoint {brief(leaf.kind, leaf.shape, leaf.dtype)}, not in the target; "
            "add it, or restore with partial=True"
            for leaf in saved.leaves
            if leaf.path not in expected and leaf.kind not in ("none", "empty")
        ]
    if problems:
        raise Mismatch(where, problems)
    return chosen


def _problem(
    leaf: TargetLeaf, found: LeafSpec | None, by_path: dict[tuple[str, ...], LeafSpec], cast: bool
) -> str | None:
    if leaf.held:
        return (
            f"target {brief(leaf.kind, leaf.shape, leaf.dtype)}, but this process holds it as "
            f"{brief(leaf.kind, (), leaf.held).removesuffix('[]')}, which would truncate values: enable x64 "
            "(jax.config.update('jax_enable_x64', True)), or ask for numpy, or for that dtype with cast=True"
        )
    if found is not None and (leaf.kind, leaf.shape, leaf.dtype) == (found.kind, found.shape, found.dtype):
        return None  # the common case first
    expected = brief(leaf.kind, leaf.shape, leaf.dtype)
    if found is None:
        if leaf.kind in ("none", "empty"):
            below = sum(path[: len(leaf.path)] == leaf.path for path in by_path)
            return f"checkpoint has {below} leaves below, target {expected}; give them a target" if below else None
        return f"not in the checkpoint, target {expected}; it holds {_nearest(leaf.path, by_path)}"
    got = brief(found.kind, found.shape, found.dtype)
    both_stored = leaf.kind in STORED_KINDS and found.kind in STORED_KINDS
    if not both_stored:
        same_number = found.number != "" and found.number == leaf.number
        if same_number and not found.in_store and not _holds(leaf.dtype, found):
            return (
                f"checkpoint {found.kind} {found.value}, target {expected}, which cannot hold it; ask for a wider dtype"
            )
        both_empty = {leaf.kind, found.kind} <= {"none", "empty"}
        return None if same_number or both_empty or leaf.kind == found.kind else f"checkpoint {got}, target {expected}"
    if leaf.shape != found.shape:
        return f"checkpoint {got}, target {expected}; shapes must be equal"
    if leaf.dtype == found.dtype:
        return None
    if "key<" in leaf.dtype + found.dtype:
        return f"checkpoint {got}, target {expected}; PRNG keys cannot be cast"
    short = brief(found.kind, (), found.dtype).removesuffix("[]")
    return None if cast else f"checkpoint {got}, target {expected}; restore as {short} and cast, or pass cast=True"


def _holds(dtype: str, number: LeafSpec) -> bool:
    """Whether an array of `dtype` can hold this Python number, rounded where it is not an integer."""
    if number.kind != "int" or not number.value or not dtype:
        return True
    bits = int(dtype.lstrip("uint"))
    low, high = (0, 1 << bits) if dtype.startswith("u") else (-(1 << bits - 1), 1 << bits - 1)
    return low <= int(number.value) < high


def _nearest(path: tuple[str, ...], by_path: dict[tuple[str, ...], LeafSpec]) -> str:
    """The names beside a missing one, to show a typo or a renamed module."""
    for depth in range(len(path) - 1, -1, -1):
        names = sorted({other[depth] for other in by_path if len(other) > depth and other[:depth] == path[:depth]})
        if names:
            label = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            return f"under {'/'.join(path[:depth]) or '(root)'}: {label}"
    return "no leaves"


def tree_differences(saved: TreeSpec, new: TreeSpec, limit: int = 5) -> list[str]:
    """First lines of how two trees differ in paths, kinds, shapes or dtypes; [] if they are of the same job."""
    old_leaves = {leaf.path: leaf for leaf in saved.leaves}
    new_leaves = {leaf.path: leaf for leaf in new.leaves}
    lines = []
    for path in sorted(old_leaves.keys() | new_leaves.keys()):
        old, fresh = old_leaves.get(path), new_leaves.get(path)
        was = brief(old.kind, old.shape, old.dtype) if old else "nothing"
        now = brief(fresh.kind, fresh.shape, fresh.dtype) if fresh else "nothing"
        if old and fresh and old.kind != fresh.kind and old.kind_stored and fresh.kind_stored:  # f32[8], both of them
            was, now = f"{was} ({_KINDS.get(old.kind, old.kind)})", f"{now} ({_KINDS.get(fresh.kind, fresh.kind)})"
        same_number = old and fresh and old.number and old.number == fresh.number
        no_data = old and fresh and {old.kind, fresh.kind} <= {"none", "empty"}
        if not same_number and not no_data and (old and old.kind, was) != (fresh and fresh.kind, now):
            lines.append(f"{'/'.join(path) or '(root)'}: the run has {was}, this job {now}")
    return lines[:limit]

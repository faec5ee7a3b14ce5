"""`orchestrator diff ROOT A B`: which leaves differ between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, live_step, open_store, step_of
from orchestrator.errors import EXIT_DAMAGED, EXIT_FAILED, EXIT_OK, Damaged


class ComparedLeaf(Result, frozen=True):
    """`a`, `b`: its type on either side. `by`: how it was found out. `elements`: how many differ; `largest`: by how
    much at most; None where nobody has read them. problem: why it could not be compared (`unreadable`)."""

    leaf: str
    a: str
    b: str
    state: str
    by: str
    elements: int | None
    largest: float | None
    problem: str = ""


class Comparison(Result, frozen=True):
    """`diff`. a, b: steps. equal: how many leaves are. unreadable: leaves of which nobody knows."""

    a: int
    b: int
    root: str
    other: str
    equal: int
    differing: tuple[ComparedLeaf, ...]
    unreadable: tuple[ComparedLeaf, ...] = ()


@dataclass(frozen=True)
class ComparedSteps:
    """Two steps and all their leaves, the equal ones, too."""

    a: int
    b: int
    root: str
    other: str
    leaves: tuple[ComparedLeaf, ...]
    damaged: bool = False

    @property
    def differing(self) -> tuple[ComparedLeaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.state not in ("equal", "unreadable"))

    @property
    def unreadable(self) -> tuple[ComparedLeaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.state == "unreadable")


def run(root: str, flags: Flags) -> ComparedSteps:
    from orchestrator.tools.diff import Side, compare  # JAX takes a second to import: only here

    first, second = open_store(root), open_store(flags["other"] or root)
    a, b = live_step(first, step_of(flags["a"], "A")), live_step(second, step_of(flags["b"], "B"))
    sides = Side(first, a), Side(second, b)
    with render.bar("reading", None, "bytes") as bar:
        found = compare(*sides, measure=flags["max_difference"], on_bytes=bar.add)
    leaves = [
        ComparedLeaf(one.leaf, one.a, one.b, one.state, one.by, one.elements, one.largest, str(one.problem or ""))
        for one in found
    ]
    damaged = any(isinstance(one.problem, Damaged) for one in found)
    return ComparedSteps(a.step, b.step, first.url, second.url, tuple(leaves), damaged)


def encode(found: ComparedSteps) -> Comparison:
    differing, unreadable = found.differing, found.unreadable
    equal = len(found.leaves) - len(differing) - len(unreadable)
    return Comparison(found.a, found.b, found.root, found.other, equal, differing, unreadable)


def show(found: ComparedSteps, flags: Flags) -> Iterator[render.Shown]:
    columns = ["leaf", "a", "b", "state", "found by", *(["elements", "largest"] if flags["max_difference"] else [])]
    rows = []
    for one in found.leaves if flags["all"] else (*found.differing, *found.unreadable):
        b = one.b if one.b != one.a else ""
        row: list[render.Cell] = [one.leaf, one.a, b, render.toned(one.state), one.by]
        if flags["max_difference"]:
            row += ["" if value is None else f"{value:g}" for value in (one.elements, one.largest)]
        rows.append(row)
    if rows:
        yield render.table(columns, rows, right=["elements", "largest"])
    for one in found.unreadable:
        yield render.toned(f"{one.leaf}: {one.problem}", "bad")
    if found.unreadable:
        yield render.toned(f"{len(found.unreadable)} leaves could not be read: nobody knows whether they differ", "bad")
    yield f"{len(found.differing)} of {len(found.leaves)} leaves differ between step {found.a} and step {found.b}"


def exit_code(found: ComparedSteps) -> int:
    """4 if a leaf is damaged, 1 if one differs or could not be read."""
    if found.damaged:
        return EXIT_DAMAGED
    return EXIT_FAILED if found.differing or found.unreadable else EXIT_OK


COMMAND = Command(
    run,
    show,
    "which leaves differ between steps A and B",
    flags=(
        Flag("other", str, None, "B is a step of this run instead of ROOT"),
        Flag("max_difference", bool, False, "read what differs: how many elements, and the greatest difference"),
        Flag("all", bool, False, "show equal leaves, too"),
    ),
    examples=(
        "orchestrator diff /data/run 100 200",
        "orchestrator diff /data/run 100 100 --other=/data/second --max_difference",
    ),
    detail="Exit code 1 if a leaf differs or could not be read, 4 if one is damaged.",
    arguments=("A", "B"),
    exit_code=exit_code,
    encode=encode,
)

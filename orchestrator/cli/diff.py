"""`orchestrator diff ROOT A B`: which leaves differ between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, live_step, open_store
from orchestrator.errors import EXIT_FAILED, EXIT_OK, UsageError


class ComparedLeaf(Result, frozen=True):
    """`a`, `b`: its type on either side. `by`: how it was found out. `elements`: how many differ; `largest`: by how
    much at most; None where nobody has read them."""

    leaf: str
    a: str
    b: str
    state: str
    by: str
    elements: int | None
    largest: float | None


class Comparison(Result, frozen=True):
    """`diff`. a, b: steps. equal: how many leaves are."""

    a: int
    b: int
    root: str
    other: str
    equal: int
    differing: tuple[ComparedLeaf, ...]


@dataclass(frozen=True)
class ComparedSteps:
    """Two steps and all their leaves, the equal ones, too."""

    a: int
    b: int
    root: str
    other: str
    leaves: tuple[ComparedLeaf, ...]

    @property
    def differing(self) -> tuple[ComparedLeaf, ...]:
        return tuple(leaf for leaf in self.leaves if leaf.state != "equal")


def run(root: str, flags: Flags) -> ComparedSteps:
    from orchestrator.tools.diff import Side, compare  # JAX takes a second to import: only here

    first, second = open_store(root), open_store(flags["other"] or root)
    a, b = live_step(first, _step(flags["a"])), live_step(second, _step(flags["b"]))
    sides = Side(first, a), Side(second, b)
    with render.progress("bytes") as display:
        bar = render.Bar(display, "reading", None)
        found = compare(*sides, measure=flags["max_difference"], on_bytes=bar.add)
    leaves = [ComparedLeaf(one.leaf, one.a, one.b, one.state, one.by, one.elements, one.largest) for one in found]
    return ComparedSteps(a.step, b.step, first.url, second.url, tuple(leaves))


def _step(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text!r} is not a step; usage: orchestrator diff ROOT A B, where A and B are steps")
    return int(text)


def encode(found: ComparedSteps) -> Comparison:
    differing = found.differing
    return Comparison(found.a, found.b, found.root, found.other, len(found.leaves) - len(differing), differing)


def show(found: ComparedSteps, flags: Flags) -> Iterator[render.Shown]:
    columns = ["leaf", "a", "b", "state", "found by", *(["elements", "largest"] if flags["max_difference"] else [])]
    rows = []
    for one in found.leaves if flags["all"] else found.differing:
        row = [one.leaf, one.a, one.b if one.b != one.a else "", one.state, one.by]
        if flags["max_difference"]:
            row += ["" if value is None else f"{value:g}" for value in (one.elements, one.largest)]
        rows.append(row)
    if rows:
        yield render.table(columns, rows, right=["elements", "largest"])
    yield f"{len(found.differing)} of {len(found.leaves)} leaves differ between step {found.a} and step {found.b}"


def exit_code(found: ComparedSteps) -> int:
    return EXIT_FAILED if found.differing else EXIT_OK


COMMAND = Command(
    run,
    show,
    "which leaves differ between steps A and B; 1 if any does",
    flags=(
        Flag("other", str, None, "B is a step of this run instead of ROOT"),
        Flag("max_difference", bool, False, "read what differs: how many elements, and the greatest difference"),
        Flag("all", bool, False, "show equal leaves, too"),
    ),
    examples=(
        "orchestrator diff /data/run 100 200",
        "orchestrator diff /data/run 100 100 --other=/data/second --max_difference",
    ),
    arguments=("A", "B"),
    exit_code=exit_code,
    encode=encode,
)

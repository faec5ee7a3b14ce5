"""The lines of JSON that benchmarks print and the table of goals reads: each one's name and fields, defined once.

`say` prints no other line, and `benchmarks.goal_table` asks for no other: what is renamed in one place and not in the
other fails at once, and not as a goal that was "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    """by: the module that prints it."""

    by: str
    fields: frozenset[str]


def _line(by: str, *fields: str) -> Line:
    return Line(f"benchmarks.{by}", frozenset(fields))


_LOST = ("lost", "blocked", "longest step", "durable", "steps", "slow")
LINES = {
    "step": _line("goals", "median", "spread"),
    "lost, warming up": _line("goals", "peer", *_LOST),
    "lost": _line("goals", "peer", *_LOST),
    "ready to save, after the restore and compiling a step": _line("goals", "ms", "held"),
    "first save": _line("goals", "told", "held", *_LOST),
    "later save": _line("goals", "told", "held", *_LOST),
    "3000 leaves: ready to save": _line("goals", "ms"),
    "3000 leaves": _line("goals", "told", "step", *_LOST),
    "3000 leaves restored": _line("goals", "ms"),
    "first restore": _line("goals", "peer", "ms", "grown"),
    "restore": _line("goals", "peer", "ms", "grown"),
    "first donating step": _line("donating", "grown", "reused", "round"),
}
# Of a job on CPU devices: {"shape": ..., peer: {column: [seconds, or a ratio, of each round]}}.
TIMES = ("blocked", "durable", "restore", "other mesh", "one process")
RESTORES = TIMES[2:]
AMPLIFICATIONS = tuple(f"{column} {kind}" for column in RESTORES for kind in ("read", "reported"))
COMPARED = {*TIMES, *AMPLIFICATIONS}
# Of a simulated commit: {"hosts": ..., "commit_s": ..., ...}.
HOSTS, COMMIT = "hosts", "commit_s"


def say(figure: str, **values: Any) -> None:
    """Print a line. Raises ValueError where it is not the one that is defined above."""
    if values.keys() != LINES[figure].fields:
        raise ValueError(f"{figure}: {sorted(values)}, expected {sorted(LINES[figure].fields)}")
    print(json.dumps({"figure": figure, **values}), flush=True)


def compared(shape: str, results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The line of one shape."""
    return json.dumps({"shape": shape, **results})

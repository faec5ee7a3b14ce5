"""Every goal for speed as a row: what was measured before, the limit, the goal, what is measured now, and the command.

    python -m benchmarks.simulate --hosts 10000 50000 --rounds=7 --json >> found.jsonl
    python -m benchmarks.compare --shape=leaves --json >> found.jsonl
    python -m benchmarks.goal_table found.jsonl --write=docs      # into docs/goals.json and docs/benchmarks.md
    python -m benchmarks.goal_table                               # the table of what docs/goals.json has

Reads the JSON lines that the benchmarks print, whichever of them are there; of a figure that comes several times the
median counts. A goal of which nothing was measured stays a row, and says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import figures, report
from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES

Line = Mapping[str, Any]
Pick = Callable[[list[Line]], float | None]
COMMAND = "python -m benchmarks.goal_table FILE --write=docs"
GPU, CPU = "an H100", "CPU devices"
KEPT = Path(__file__).parents[1] / "docs" / "goals.json"


@dataclass(frozen=True)
class Goal:
    """at_most: the goal, in `unit`. before, limit: as the issue that set the goals has them. command: prints the lines
    that `pick` finds the figure in."""

    name: str
    where: str
    what: str
    unit: str
    before: str
    limit: str
    at_most: float
    command: str
    pick: Pick


def figure(name: str, field: str, **given: Any) -> Pick:
    """The median of `field` over lines {"figure": name, **given}."""
    assert {field, *given} <= figures.LINES[name].fields, (name, field, given)

    def pick(lines: list[Line]) -> float | None:
        expected = {"figure": name, **given}
        found = [line[field] for line in lines if field in line and expected.items() <= line.items()]
        return statistics.median(found) if found else None

    return pick


def less(first: Pick, second: Pick) -> Pick:
    def pick(lines: list[Line]) -> float | None:
        a, b = first(lines), second(lines)
        return None if a is None or b is None else a - b

    return pick


def compared(shape: str, column: str, over: str = "", peer: str = "ours") -> Pick:
    """Of the newest line of `benchmarks.compare --json` about `shape`: the median of `column`, over another peer's if
    one is named."""
    peers = [name for name in (peer, over) if name]
    assert shape in SHAPES and column in figures.COMPARED and PEERS.keys() >= set(peers), (shape, column, peers)

    def pick(lines: list[Line]) -> float | None:
        for line in reversed(lines):
            if line.get("shape") == shape and all(column in line.get(name, {}) for name in peers):
                value = statistics.median(line[peer][column])
                return value / statistics.median(line[over][column]) if over else value
        return None

    return pick


def simulated(hosts: int) -> Pick:
    def pick(lines: list[Line]) -> float | None:
        found = [line[figures.COMMIT] for line in lines if line.get(figures.HOSTS) == hosts]
        return statistics.median(found) if found else None

    return pick


_GPU = "python -m benchmarks.goals"
_LEAVES = "python -m benchmarks.compare --shape=leaves --json"
_ARRAYS = "python -m benchmarks.compare --shape=arrays --json"
_SIMULATE = "python -m benchmarks.simulate --hosts 10000 50000 --rounds=7 --json"
_lost = figure("lost", "lost", peer="ours")

GOALS = (
    Goal("lost", GPU, "4 GiB: training time lost to one save", "ms", "87", "3, a device copy", 20, _GPU, _lost),
    Goal("first", GPU, "4 GiB: the first save blocks", "ms", "1400 to 1900", "0", 50, _GPU,
         figure("first save", "blocked", told=True)),
    Goal("restore", GPU, "3 GiB: restore, cached", "ms", "413", "273, raw", 200, _GPU,
         figure("restore", "ms", peer="ours")),
    Goal("held", GPU, "4 GiB: page-locked memory held, over the state", "x", "1.38", "1.0", 1.05, _GPU,
         figure("later save", "held", told=True)),
    Goal("small leaves", GPU, "3000 leaves: blocked", "ms", "127", "5, packed", 15, _GPU,
         figure("3000 leaves", "blocked", told=True)),
    Goal("attest", GPU, '4 GiB: what `attest="save"` adds to lost training', "ms", "45", "2, one pass", 5, _GPU,
         less(figure("lost", "lost", peer="ours, attest=save"), _lost)),
    Goal("leaves durable", CPU, "2000 leaves of 64 B: durable, over raw", "x", "23", "-", 8, _LEAVES,
         compared("leaves", "durable", "raw limit")),
    Goal("leaves restore", CPU, "2000 leaves of 64 B: restore, over raw", "x", "30", "-", 10, _LEAVES,
         compared("leaves", "restore", "raw limit")),
    Goal("other mesh", CPU, '512 MiB onto another mesh, `chunks="tiles"`: read over needed', "x", "2.0", "1.0", 1.1,
         _ARRAYS, compared("arrays", "other mesh reported", peer="ours, tiles")),
    Goal("load_once", CPU, "512 MiB onto another mesh: `load_once` over reading", "x", "4 to 10", "1.0", 1.0, _ARRAYS,
         compared("arrays", "other mesh", "ours", "ours, load_once")),
    Goal("donating", CPU, "first donating step after a restore: further memory, over the state", "x", "1", "0", 0.05,
         "python -m benchmarks.donating", figure("first donating step", "grown")),
    Goal("10,000 hosts", "simulated", "commit of 10,000 hosts", "s", "10", "-", 3, _SIMULATE, simulated(10_000)),
    Goal("50,000 hosts", "simulated", "commit of 50,000 hosts", "s", "55", "-", 8, _SIMULATE, simulated(50_000)),
)  # fmt: skip


def measured(lines: Iterable[Line]) -> dict[str, float]:
    """Goal -> its figure, of those that these lines say something about."""
    kept = list(lines)
    found = {goal.name: goal.pick(kept) for goal in GOALS}
    return {name: round(value, 3) for name, value in found.items() if value is not None}


def table(values: Mapping[str, float]) -> str:
    header = ["on", "what", "before", "limit or best", "goal", "now", "met", "command"]
    lines = [report.row(header), report.row(["---"] * len(header))]
    for goal in GOALS:
        value = values.get(goal.name)
        now = "not measured" if value is None else f"{value:.3g} {goal.unit}"
        met = "" if value is None else "yes" if value <= goal.at_most else "**no**"
        before = f"{goal.before} {goal.unit}"
        at_most = f"<= {goal.at_most:g} {goal.unit}"
        lines.append(report.row([goal.where, goal.what, before, goal.limit, at_most, now, met, f"`{goal.command}`"]))
    return "\n".join([*lines, ""])


def read(text: str) -> list[Line]:
    """The JSON objects among the lines of what a benchmark has printed."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # a table, a warning
        if isinstance(value, dict):
            found.append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="what benchmarks have printed")
    parser.add_argument("--write", metavar="DOCS", help="put figures and table into this directory")
    args = parser.parse_args()
    found = measured(line for file in args.files for line in read(file.read_text()))
    values = {**(json.loads(KEPT.read_text()) if KEPT.exists() else {}), **found}
    print(table(values))
    if args.write:
        (Path(args.write) / KEPT.name).write_text(json.dumps(values, indent=1) + "\n")
        report.put(args.write, COMMAND, table(values), report.SUMMARY)


if __name__ == "__main__":
    main()

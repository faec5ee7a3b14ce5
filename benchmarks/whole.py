"""Everything that `make bench` measures on CPU devices, in as many rounds as fit into its time.

    python -m benchmarks.whole --plan              # what would be done, and how long it is expected to take
    python -m benchmarks.whole --write=docs        # 40 minutes at most; into docs/
    python -m benchmarks.whole --budget=20 --parts arrays leaves

What a round takes is expected from the figures that docs/benchmarks.json has of the run before, for the peers that are
installed. Where all of it takes too long, the part whose round takes longest has fewer of them; after each part what is
left is planned again, by how long the parts have really taken. A part for which there is no time even with its fewest
rounds is left out and named (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import TIMES
from benchmarks.peers import missing, peers_for
from benchmarks.shapes import SHAPES

BUDGET_MIN = 40.0
KEPT = Path(__file__).parents[1] / "docs" / "benchmarks.json"
# Beside what is timed: making states, touching free memory, deleting. With it all rounds of all parts are expected to
# take the 71 minutes that they took when docs/benchmarks.json was measured.
_OVERHEAD = 1.73
_JOB_S = 8.0  # until a job's processes have loaded all that they compare
_FEWEST = {"arrays": 7, "leaves": 7, "replicated": 5, "gpt2": 3, "large": 1}  # of the first two, goals are medians
_GROWTH_S, _GROWTH_ROUND_S = 180.0, 80.0  # jobs' starts; a round of all series and sizes


@dataclass(frozen=True)
class Part:
    """fixed_s: what it takes whatever the rounds. fewest: rounds that are worth having."""

    name: str
    fixed_s: float
    round_s: float
    rounds: int
    fewest: int

    @property
    def seconds(self) -> float:
        return self.fixed_s + self.round_s * self.rounds


def parts(figures: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> list[Part]:
    """The dearest last: it is what has fewer rounds where the others took longer than expected."""
    found = []
    for name in ("arrays", "leaves", "replicated", "gpt2", "large"):
        shape = SHAPES[name]
        round_s = _round_s(figures, name)
        warm_up_s = _round_s(figures, shape.warm_up or name)
        peaks_s = (len(peers_for(name)) * _JOB_S + warm_up_s + round_s) if shape.peaks else 0.0
        found.append(Part(name, 2 * _JOB_S + warm_up_s + peaks_s, round_s, shape.rounds, _FEWEST[name]))
    return [*found[:-1], Part("growth", _GROWTH_S, _GROWTH_ROUND_S, 5, 2), found[-1]]


def _round_s(figures: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], shape: str) -> float:
    timed = [had[column] for name, had in figures[shape].items() if name in peers_for(shape) for column in TIMES[1:]
             if column in had]  # fmt: skip
    return _OVERHEAD * sum(map(statistics.median, timed))


def fitted(planned: Sequence[Part], budget_s: float) -> list[Part]:
    """With as many rounds as fit, none with fewer than its fewest: parts are left out then, the last ones first."""
    found = list(planned)
    while found and sum(part.seconds for part in found) > budget_s:
        dearest = max(
            (part for part in found if part.rounds > part.fewest), key=lambda part: part.round_s, default=None
        )
        if dearest is None:
            found.pop()
        else:
            found[found.index(dearest)] = replace(dearest, rounds=dearest.rounds - 1)
    return found


def shown(planned: Sequence[Part], budget_s: float) -> str:
    lines = ["| part | rounds | minutes expected |", "|---|---|---|"]
    lines += [f"| {part.name} | {part.rounds} | {part.seconds / 60:.1f} |" for part in planned]
    return "\n".join([*lines, f"| all | | {sum(part.seconds for part in planned) / 60:.1f} of {budget_s / 60:g} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET_MIN, help="minutes for all parts")
    every = parts(json.loads(KEPT.read_text()))
    parser.add_argument("--parts", nargs="*", choices=[part.name for part in every], help="only these")
    parser.add_argument("--plan", action="store_true", help="only say what would be done")
    parser.add_argument("--write", metavar="DOCS", help="put tables and plots into this directory")
    args = parser.parse_args()
    for package, names in missing().items():
        print(f"{' and '.join(names)}: left out, {package} is not installed (pip install -e '.[bench]')")
    chosen = [part for part in every if not args.parts or part.name in args.parts]
    print(shown(fitted(chosen, args.budget * 60), args.budget * 60), flush=True)
    if args.plan:
        return
    if wrong := run(chosen, args.budget * 60, args.write):
        sys.exit("\n".join(wrong))


def run(chosen: Sequence[Part], budget_s: float, write: str | None) -> list[str]:
    """What was left out or failed."""
    began, expected_s, wrong, left = time.monotonic(), 0.0, [], list(chosen)
    while left:
        spent_s = time.monotonic() - began
        pace = max(spent_s / expected_s, 0.5) if expected_s else 1.0
        # Rounds that a slow part before has cost come back if the next ones are quicker.
        fitting = fitted([slowed(part, pace) for part in left], budget_s - spent_s)
        if not fitting:
            return [*wrong, *(f"{part.name}: left out, {budget_s - spent_s:.0f} s are left" for part in left)]
        part = left.pop(0)
        rounds, started = fitting[0].rounds, time.monotonic()
        print(f"\n{part.name}: {rounds} rounds, {fitting[0].seconds / 60:.1f} minutes expected", flush=True)
        wrong += _measured(part.name, rounds, budget_s - spent_s, write)
        expected_s += replace(part, rounds=rounds).seconds
        print(f"{part.name}: {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    return wrong


def slowed(part: Part, pace: float) -> Part:
    return replace(part, fixed_s=part.fixed_s * pace, round_s=part.round_s * pace)


def _measured(name: str, rounds: int, limit_s: float, write: str | None) -> list[str]:
    module = ["benchmarks.growth"] if name == "growth" else ["benchmarks.compare", f"--shape={name}"]
    command = [sys.executable, "-m", *module, f"--rounds={rounds}", *([f"--write={write}"] if write else [])]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its workers
            return [f"{name}: ended, its time of {limit_s:.0f} s is over; nothing of it was written"]
    return [f"{name}: exit code {code}"] if code else []


if __name__ == "__main__":
    main()

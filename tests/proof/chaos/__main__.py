"""Runs rounds of faults and checks the whole run after each one, from outside.

    python -m tests.proof.chaos --rounds=200 --seed=1
    python -m tests.proof.chaos --only=zombie --rounds=12

Prints a line for each round and a table at the end (`--report=FILE` writes it as Markdown). Ends with 1 if a promise
was broken, something hung, or a process was left over. The same seed makes the same rounds.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.proof.chaos import check, faults, tier_faults
from tests.proof.chaos.arena import Arena, Hang

ROUNDS_PER_ARENA = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="rounds whose kind or detail contains this")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    for kind, reason in faults.tools().items():
        print(f"skipped: {kind}: {reason}")
    outcomes: dict[str, collections.Counter[str]] = {}
    wrong: list[str] = []
    started = time.monotonic()
    for number, (one, arena) in enumerate(rounds(args.seed, args.only, args.rounds), 1):
        began = time.monotonic()
        outcome, problems = play(one, arena)
        outcomes.setdefault(one.kind, collections.Counter())[outcome] += 1
        wrong += [f"round {number} ({one.kind}: {one.what}): {line}" for line in problems]
        seconds = time.monotonic() - began
        print(f"{number:4} {seconds:5.1f} s  {one.kind}: {one.what}: {outcome}", *problems, sep="\n  !! ", flush=True)
    table = report(outcomes, wrong, args.seed, time.monotonic() - started)
    print(table)
    if args.report:
        args.report.write_text(table)
    return 1 if wrong else 0


def rounds(seed: int, only: str, count: int) -> Iterator[tuple[faults.Round, Arena]]:
    """Each with its arena: a run that several rounds in a row have gone through, or a fresh one."""
    chosen = (one for one in faults.plan(seed, tier_faults.sweep) if only in f"{one.kind}: {one.what}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        shared, used = Path(scratch), 0
        arena = None
        for number in range(count):
            one = next(chosen)
            if one.fresh:
                yield one, new_arena(shared / f"fresh-{number}")
                continue
            if arena is None or used == ROUNDS_PER_ARENA:
                if arena:
                    faults.remove(arena.base)
                arena, used = new_arena(shared / f"arena-{number}"), 0
            used += 1
            yield one, arena


def new_arena(base: Path) -> Arena:
    base.mkdir()
    return Arena(base, base / "disk" / "run")


def play(one: faults.Round, arena: Arena) -> tuple[str, list[str]]:
    """(outcome, what was not as promised)."""
    problems: list[str] = []
    try:
        outcome = one.run(arena)
    except (Hang, faults.Unexpected, OSError) as error:
        outcome, problems = "WRONG", [f"{type(error).__name__}: {error}"]
    left = arena.end()
    if left:
        problems.append(f"left over: processes {left}")
    problems += arena.crashes()
    if not one.fresh:
        problems += check.violations(arena.root, arena.story()) + check.leftovers(arena.root)
    return outcome, problems + arena.problems


def report(outcomes: dict[str, collections.Counter[str]], wrong: list[str], seed: int, seconds: float) -> str:
    total = sum(counter.total() for counter in outcomes.values())
    lines = ["| fault | rounds | outcomes |", "|---|---|---|"]
    for kind, counter in sorted(outcomes.items()):
        told = ", ".join(f"{outcome}: {count}" for outcome, count in counter.most_common())
        lines.append(f"| {kind} | {counter.total()} | {told} |")
    lines += ["", f"{total} rounds with seed {seed} in {seconds / 60:.0f} minutes; {len(wrong)} promises broken."]
    return "\n".join([*lines, *(f"- {line}" for line in wrong)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

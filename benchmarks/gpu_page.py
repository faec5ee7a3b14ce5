"""The figures of docs/benchmarks.md that need an accelerator, all in eight minutes of one.

    python -m benchmarks.gpu_page --out DIR                # one GPU, 4 GiB; DIR/gpu.jsonl, and the table of goals
    python -m benchmarks.goal_table DIR/gpu.jsonl --write=docs
    python -m benchmarks.gpu_page --out DIR --dry          # small, on CPU devices, half a minute: only whether it runs

Parts run in order of value, each in a process of its own, which writes its lines as soon as it has them. A part for
which too little of the time is left is not begun, and what is left out or failed is named at the end (exit code 1).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks import jobs

BUDGET_S = 480.0
LIMIT_S = 90.0  # of one part
LEAST_S = 15.0  # a process has JAX up and a state made by then
FILE = "gpu.jsonl"


@dataclass(frozen=True)
class Part:
    """module: has `parse` and `RUN`, by section. arguments: of the module."""

    section: str
    module: str = "goals"
    arguments: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((self.module, self.section, *self.arguments))


PARTS = (
    Part("lost"),
    Part("first"),
    Part("leaves"),
    Part("restore"),
    Part("lost", arguments=("--no-fetch",)),
    Part("phases", "restore_phases"),
    Part("first-cold"),
    Part("first-ring"),
    Part("leaves-cold"),
)


def run(part: Part, dry: bool) -> None:
    """In this process."""
    if part.module == "goals":
        from benchmarks import goals

        args = goals.parse([*part.arguments, *(["--smoke"] if dry else [])])
        if dry:
            args.bytes //= 8
            args.rounds = 0 if part.arguments else 1  # a part with arguments is one that has been run without them
        goals.RUN[part.section](args)
    else:
        from benchmarks import restore_phases

        arguments = restore_phases.parse([*part.arguments, *(["--smoke"] if dry else [])])
        if dry:
            arguments.bytes //= 8
        restore_phases.run(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=jobs.directory, required=True, help=f"where {FILE} is written")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts")
    parser.add_argument("--dry", action="store_true", help="every part, small, on whatever device there is")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        run(PARTS[args.part], dry=False)
        sys.stdout.flush()
        os._exit(0)  # whatever threads there are
    path = Path(args.out) / FILE
    with path.open("w") as lines:
        wrong = _dry(lines) if args.dry else _measure(lines, args.budget)
    from benchmarks import goal_table

    print(goal_table.table(goal_table.measured(goal_table.read(path.read_text()))))
    print("\n".join([*wrong, f"lines: {path}"]), flush=True)
    sys.stdout.flush()
    os._exit(1 if wrong else 0)


def _dry(lines: IO[str]) -> list[str]:
    """All in this process: what takes time is to start one."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with contextlib.redirect_stdout(lines):
        for part in PARTS:
            run(part, dry=True)
    return []


def _measure(lines: IO[str], budget_s: float) -> list[str]:
    """What was left out or failed."""
    wrong, ends = [], time.monotonic() + budget_s
    for number, part in enumerate(PARTS):
        left_s = ends - time.monotonic()
        if left_s < LEAST_S:
            wrong.append(f"{part.label}: left out, {left_s:.0f} of {budget_s:.0f} s are left")
            continue
        started = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu_page", "--out", ".", "--part", str(number)]
        try:
            done = subprocess.run(
                command, stdout=lines, stderr=subprocess.PIPE, text=True, timeout=min(LIMIT_S, left_s)
            )
            if done.returncode:
                wrong.append(f"{part.label}: exit code {done.returncode}: {done.stderr[-1500:]}")
        except subprocess.TimeoutExpired:
            wrong.append(f"{part.label}: ended after {time.monotonic() - started:.0f} s; its lines until then are kept")
        print(f"{part.label}: {time.monotonic() - started:.0f} s", flush=True)
    return wrong


if __name__ == "__main__":
    main()

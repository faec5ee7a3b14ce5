"""Three minutes before and after a change: what it made slower or faster, as ratios.

    make bench-quick                        # before a change: writes build/bench-quick.json
    make bench-quick                        # after it: the same, and the ratios to what that file has
    make bench-quick AGAINST=../main        # better: this checkout and another one, in turn, on one machine
    make bench-quick NEW=1                  # what is measured now is the new baseline

Two processes with two CPU devices each save and restore 128 MiB in 16 arrays, and 2000 leaves of 64 B. *raw* are the
same bytes in one plain file per process, in the same rounds: what it takes longer, the machine took longer. A ratio is
called slower or faster where nearly all turns, of at least four, agree and the median differs by a tenth; seconds of
different days are no argument. Also the simulated commit of 10,000 hosts, which is mostly processor time of the rules.
On a busy machine there are fewer turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import figures, jobs  # nothing that imports the package: a worker's may be another checkout's

HERE = Path(__file__).resolve().parents[1]
BASELINE = HERE / "build" / "bench-quick.json"
PROCESSES, DEVICES, TURNS, ROUNDS = 2, 2, 5, 2
STATES = {"128 MiB": (16, 2 << 20), "2000 leaves": (2000, 16)}
BUDGET_S = 170  # but for the first, no turn is begun that would end later
_CHECKOUT = "BENCH_CHECKOUT"
_NOTABLE, _NEARLY_ALL, _FEWEST = 0.1, 0.8, 4

Turns = list[dict[str, float]]  # one job each: figure -> seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=jobs.directory, help="another checkout, measured in turn with this one")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--new", action="store_true", help="write the baseline, whether there is one or not")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--directory", type=jobs.directory, help="where to write")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(int(args.worker[0]), args.worker[1], args.directory)
        return
    other = Path(args.against).resolve() if args.against else None
    ours, theirs = in_turn(args, other)
    if other:
        print(f"this checkout over {other}: {len(ours)} turns, interleaved\n\n{table(theirs, ours)}")
        return
    kept = json.loads(args.baseline.read_text()) if args.baseline.exists() and not args.new else None
    if kept is None:
        args.baseline.parent.mkdir(parents=True, exist_ok=True)
        args.baseline.write_text(json.dumps(ours) + "\n")
        print(f"{table(ours, ours)}\nwritten to {args.baseline}; run this again after your change")
    else:
        print(f"now over {args.baseline}, which was measured at another time\n\n{table(kept, ours)}")


def in_turn(args: argparse.Namespace, other: Path | None) -> tuple[Turns, Turns]:
    """This checkout's turns, and the other's. Who begins changes from turn to turn."""
    found: dict[Path, Turns] = {checkout: [] for checkout in (HERE, other) if checkout}
    started = time.monotonic()
    for number in range(args.turns):
        spent_s = time.monotonic() - started
        if number and spent_s * (number + 1) / number > BUDGET_S:
            print(f"{number} of {args.turns} turns took {spent_s:.0f} s: the machine is busy", file=sys.stderr)
            break
        print(f"turn {number + 1} of {args.turns}, {spent_s:.0f} s so far", file=sys.stderr)
        for checkout in list(found)[:: -1 if number % 2 else 1]:
            found[checkout].append(_job(checkout, args.directory) | (_simulated(checkout)))
    return found[HERE], found[other] if other else []


def _job(checkout: Path, directory: str | None) -> dict[str, float]:
    scratch = tempfile.mkdtemp(prefix="quick-", dir=directory)
    surroundings = {_CHECKOUT: str(checkout), "PYTHONPATH": str(HERE)}
    try:
        found: dict[str, float] = jobs.run("benchmarks.quick", ["--directory", scratch], PROCESSES, surroundings)
        return found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _simulated(checkout: Path) -> dict[str, float]:
    """By the checkout's own program, which knows its rules; {} where it cannot."""
    command = [sys.executable, "-m", "benchmarks.simulate", "--hosts", "10000", "--json"]
    surroundings = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=surroundings, timeout=300)
    with contextlib.suppress(ValueError, KeyError):
        line = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}
        return {"10,000 hosts, simulated: commit": line[figures.COMMIT], "10,000 hosts, simulated: CPU": line["cpu_s"]}
    return {}


def table(before: Turns, now: Turns) -> str:
    """Markdown: medians, their ratio and over how many turns it holds, and ours over raw."""
    from benchmarks import report

    lines = [report.row(["median ms", "before", "now", "now / before", "turns (min to max)", ""])]
    lines.append(report.row(["---"] * 6))
    for name in now[0]:
        old = [turn[name] for turn in before if name in turn]
        new = [turn[name] for turn in now if name in turn]
        if not old or not new:
            lines.append(report.row([name, _ms(old), _ms(new), "", "", "not measured in both"]))
            continue
        ratios = [b / a for a, b in zip(old, new, strict=False)]
        ratio = statistics.median(new) / statistics.median(old)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(report.row([name, _ms(old), _ms(new), f"{ratio:.2f}", spread, verdict(name, ratio, ratios)]))
    return "\n".join([*lines, "", *_over_raw(now), ""])


def verdict(name: str, ratio: float, ratios: list[float]) -> str:
    """What a ratio and those of its turns say; '' if nothing."""
    if name.endswith(_RAW):
        return "the machine"
    if len(ratios) < _FEWEST and abs(ratio - 1) >= _NOTABLE:
        return "too few turns to say"
    agree = sum((one > 1) == (ratio > 1) for one in ratios) / len(ratios)
    if abs(ratio - 1) < _NOTABLE or agree < _NEARLY_ALL:
        return ""
    return "**slower**" if ratio > 1 else "faster"


_RAW = "raw"


def _over_raw(turns: Turns) -> list[str]:
    """How ours compares with its limit, in these turns."""
    said = []
    for state in STATES:
        for column in ("durable", "restore"):
            ratios = [turn[f"{state}: {column}"] / turn[f"{state}: {column}, {_RAW}"] for turn in turns]
            said.append(f"{state}, {column}: {statistics.median(ratios):.2f} x raw")
    return ["; ".join(said)]


def _ms(values: list[float]) -> str:
    return f"{statistics.median(values) * 1000:.1f}" if values else ""


# One process of a job.


def work(index: int, port: str, directory: str) -> None:
    checkout = Path(os.environ[_CHECKOUT])
    sys.path.insert(0, str(checkout))
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    where = f"127.0.0.1:{port}"
    jax.distributed.initialize(where, PROCESSES, index, coordinator_bind_address=where)
    import orchestrator

    if checkout not in Path(orchestrator.__file__).parents:
        sys.exit(f"the package is that of {orchestrator.__file__}, expected one below {checkout}")
    figures: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):  # the first warms up
        for state, (leaves, elements) in STATES.items():
            root = Path(directory) / f"{leaves}-{number}"
            for name, seconds in _round(root, leaves, elements).items() if number else _nothing(root, leaves, elements):
                figures.setdefault(f"{state}: {name}", []).append(seconds)
            if index == 0:
                shutil.rmtree(root, ignore_errors=True)
    if index == 0:
        print(json.dumps({name: statistics.median(values) for name, values in figures.items()}), flush=True)
    os._exit(0)


def _nothing(root: Path, leaves: int, elements: int) -> Any:
    _round(root, leaves, elements)
    return ()


def _round(root: Path, leaves: int, elements: int) -> Mapping[str, float]:
    """Seconds of each part: ours, and the same bytes in a plain file per process."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import orchestrator as oc
    from benchmarks.growth import _state
    from benchmarks.worker import held_bytes, together, touch_free_memory

    meet, state = together(PROCESSES), _state(leaves, elements)
    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    same = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}
    whole = NamedSharding(mesh, PartitionSpec())
    other = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for name, leaf in state.items()}
    found: dict[str, float] = {}

    def timed(name: str, call: Any) -> None:
        touch_free_memory(held_bytes(state))
        meet()
        started = time.perf_counter()
        call()
        meet()
        found[name] = time.perf_counter() - started

    with oc.Agent(root, options=oc.Options(on_save_failure="raise")) as agent:

        def save() -> None:
            started = time.perf_counter()
            agent.save(1, state)
            found["blocked"] = time.perf_counter() - started
            agent.wait_until_finished()

        timed("durable", save)
        timed("restore", lambda: jax.block_until_ready(agent.restore(same).state))  # type: ignore[union-attr]
        timed("onto another mesh", lambda: jax.block_until_ready(agent.restore(other).state))  # type: ignore[union-attr]
    _raw(root, state, timed)
    return found


def _raw(root: Path, state: dict[str, Any], timed: Any) -> None:
    import jax
    import numpy as np

    path = root / f"raw-{jax.process_index()}"
    parts = [np.asarray(shard.data) for leaf in state.values() for shard in leaf.addressable_shards]

    def write() -> None:
        with path.open("wb", buffering=1 << 20) as file:
            for part in parts:
                file.write(part.data)
            file.flush()
            os.fsync(file.fileno())

    timed(f"durable, {_RAW}", write)
    timed(f"restore, {_RAW}", lambda: np.fromfile(path, np.uint8))


if __name__ == "__main__":
    main()

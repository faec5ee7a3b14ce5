"""Saves and restores beside Orbax's CheckpointManager and PyTorch's distributed checkpoint.

    python -m benchmarks.compare                         # 2 processes, 512 MiB in 16 arrays
    python -m benchmarks.compare --shape=leaves          # 2000 leaves of 64 B
    python -m benchmarks.compare --all --write=docs      # every shape, into docs/: both pages and the plot

The same state, the same processes, one run, rounds interleaved: medians and ranges of the time that training is
blocked, until durable, and to restore onto the same mesh, onto another mesh and in one process; next to them the
machine's raw limit (the same bytes to one file for each process, fsync; read back into fresh memory). Machines are
noisy: compare the ratios within one run, not seconds across runs. Peers that are not installed are left out
(`pip install -e .[bench]`).
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile

from benchmarks import figures, jobs, report
from benchmarks.peers import PEERS, missing, only, peers_for
from benchmarks.shapes import SHAPES
from benchmarks.worker import work


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="arrays")
    parser.add_argument("--all", action="store_true", help="every shape")
    parser.add_argument("--rounds", type=int, default=0, help="default: the shape's own")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument(
        "--directory", type=jobs.directory, help="where to write (default: the system's temporary directory)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", metavar="DOCS", help="put tables and plot into this directory")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="only these (default: all that are installed)")
    parser.add_argument("--memory", action="store_true", help="only the peaks of memory, one round")
    parser.add_argument("--restore-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, metavar=("INDEX", "PORT", "PORT2"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory and args.write:
        parser.error("--write: not with --memory, whose tables would have only the peaks")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.worker:
        work(args, int(args.worker[0]), args.worker[1:])
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the workers are ended on the way out
    for package, names in missing().items():
        why = f"{package} is not installed (pip install -e '.[bench]')"
        print(f"{' and '.join(names)}: left out, {why}", file=sys.stderr)
    for shape in SHAPES if args.all else [args.shape]:
        found = _shape(args, shape)
        print(figures.compared(shape, found) if args.json or args.memory else report.table(shape, found), flush=True)
        if args.write:
            report.write(args.write, {shape: found})


def _shape(args: argparse.Namespace, shape: str) -> dict[str, dict[str, list[float]]]:
    rounds = args.rounds or SHAPES[shape].rounds
    scratch = tempfile.mkdtemp(prefix="bench-", dir=args.directory)
    names = [name for name in peers_for(shape) if not args.peers or name in args.peers]
    common = ["--shape", shape, "--directory", scratch, "--peers"]
    size = ["--processes", str(args.processes), "--devices", str(args.devices)]
    alone = ["--processes", "1", "--devices", str(args.processes * args.devices), "--restore-only"]
    # Each in a job of its own: what one peer has kept would hide what the next needs.
    measured = [name for name in names if name != "raw limit" and not only(PEERS[name])]
    planned = [([*common, name, *size, "--rounds", "1", "--memory"], args.processes, _GIVE_BACK) for name in measured]
    if not SHAPES[shape].peaks and not args.memory:
        planned = []
    if not args.memory:
        timed = [*common, *names, "--rounds", str(rounds)]
        planned = [([*timed, *size], args.processes, {}), ([*timed, *alone], 1, {}), *planned]
    results: dict[str, dict[str, list[float]]] = {}
    try:
        for arguments, processes, environment in planned:
            for name, measured_of in jobs.run("benchmarks.compare", arguments, processes, environment).items():
                results.setdefault(name, {}).update(measured_of)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return results


# glibc keeps freed memory for later: then a peak would be that of the round before.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


if __name__ == "__main__":
    main()

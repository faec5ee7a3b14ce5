"""Saves and restores beside Orbax's CheckpointManager and PyTorch's distributed checkpoint.

    python -m benchmarks.compare                         # 2 processes, 512 MiB in 16 arrays
    python -m benchmarks.compare --shape=leaves          # 2000 leaves of 64 B
    python -m benchmarks.compare --all --write=docs      # every shape, into docs/benchmarks.md and its plot

The same state, the same processes, one run, rounds interleaved: medians and ranges of the time that training is
blocked, until durable, and to restore onto the same mesh, onto another mesh and in one process; next to them the
machine's raw limit (the same bytes to one file for each process, fsync; read back into fresh memory). Machines are
noisy: compare the ratios within one run, not seconds across runs. Peers that are not installed are left out
(`pip install -e .[bench]`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import report
from benchmarks.shapes import SHAPES
from benchmarks.worker import work

JOB_LIMIT_S = 1200


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="arrays")
    parser.add_argument("--all", action="store_true", help="every shape")
    parser.add_argument("--rounds", type=int, default=0, help="default: the shape's own")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--directory", default=None, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", metavar="DOCS", help="put tables and plot into this directory")
    parser.add_argument(
        "--peers", default="", help="only these, by name, with commas (default: all that are installed)"
    )
    parser.add_argument("--memory", action="store_true", help="only the peaks of memory, one round")
    parser.add_argument("--restore-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, metavar=("INDEX", "PORT", "PORT2"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.worker:
        work(args, int(args.worker[0]), args.worker[1:])
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the workers are ended on the way out
    results = {}
    for shape in SHAPES if args.all else [args.shape]:
        results[shape] = _shape(args, shape)
        shown = json.dumps(results[shape]) if args.json or args.memory else report.table(shape, results[shape])
        print(shown, flush=True)
    if args.write:
        report.write(args.write, results)


def _shape(args: argparse.Namespace, shape: str) -> dict[str, dict[str, list[float]]]:
    rounds = args.rounds or SHAPES[shape].rounds
    scratch = tempfile.mkdtemp(prefix="bench-", dir=args.directory)
    common = ["--shape", shape, "--directory", scratch, "--peers", args.peers]
    size = ["--processes", str(args.processes), "--devices", str(args.devices)]
    alone = ["--processes", "1", "--devices", str(args.processes * args.devices), "--restore-only"]
    jobs = [([*common, *size, "--rounds", "1", "--memory"], args.processes, _GIVE_BACK)]
    if not args.memory:
        timed = [*common, "--rounds", str(rounds)]
        jobs = [([*timed, *size], args.processes, {}), ([*timed, *alone], 1, {}), *jobs]
    results: dict[str, dict[str, list[float]]] = {}
    try:
        for arguments, processes, environment in jobs:
            for name, figures in _job(arguments, processes, environment).items():
                results.setdefault(name, {}).update(figures)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return results


# glibc keeps freed memory for later: then a peak would be that of the peer before.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _job(arguments: list[str], processes: int, environment: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    """Process 0's figures of one job."""
    ports = [str(_free_port()) for _ in range(2)]
    command = [sys.executable, "-m", "benchmarks.compare", *arguments, "--worker"]
    workers = [
        subprocess.Popen(
            [*command, str(index), *ports],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        )
        for index in range(processes)
    ]
    try:
        out, err = workers[0].communicate(timeout=JOB_LIMIT_S)
        for worker in workers[1:]:
            worker.communicate(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
    line = next((line for line in out.decode().splitlines() if line.startswith("{")), None)
    if line is None:
        sys.exit(f"benchmark failed: process 0 gave no result:\n{err.decode()[-2000:]}")
    found: dict[str, Any] = json.loads(line)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

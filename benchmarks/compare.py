"""Saves and restores beside Orbax's CheckpointManager: same state, same processes, one run, rounds interleaved.

    python -m benchmarks.compare                         # 2 processes, 512 MiB in 16 arrays, 5 rounds
    python -m benchmarks.compare --shape=leaves          # 2000 leaves of 64 B
    python -m benchmarks.compare --rounds=7 --json

Prints medians with the range: time that training is blocked, time until durable, time to restore, and next to them the
machine's raw limit (each process writes the same incompressible bytes to one file and fsyncs it). Machines are noisy:
compare the ratios within one run, not seconds across runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"arrays": (16, 32 << 20), "leaves": (2000, 64)}  # leaves, bytes of each
WORKER_LIMIT_S = 900


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="arrays")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--directory", default=None, help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("INDEX", "PORT"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.worker:
        work(args, int(args.worker[0]), args.worker[1])
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scratch = tempfile.mkdtemp(prefix="bench-", dir=args.directory)
    command = [sys.executable, "-m", "benchmarks.compare", *sys.argv[1:], "--directory", scratch]
    workers = [
        subprocess.Popen(
            [*command, "--worker", str(index), str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for index in range(args.processes)
    ]
    try:
        out, _ = workers[0].communicate(timeout=WORKER_LIMIT_S)
        for worker in workers[1:]:
            worker.communicate(timeout=60)
    finally:
        for worker in workers:
            worker.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    line = next((line for line in out.decode().splitlines() if line.startswith("{")), None)
    if line is None:
        sys.exit("benchmark failed: process 0 gave no result; run a worker by hand to see why")
    print(line if args.json else render(args, json.loads(line)))


def render(args: argparse.Namespace, results: dict[str, dict[str, list[float]]]) -> str:
    leaves, size = SHAPES[args.shape]
    orbax = results["orbax"]
    lines = [
        f"{leaves} leaves of {size} B, {args.processes} processes, {args.rounds} rounds: median ms (min to max)",
        f"{'':14}{'blocked':>26}{'durable':>26}{'restore':>26}",
    ]
    for name, figures in results.items():
        cells = []
        for column in ("blocked", "durable", "restore"):
            values = [value * 1000 for value in figures.get(column, [])]
            text = f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})" if values else "-"
            cells.append(f"{text:>26}")
        lines.append(f"{name:14}" + "".join(cells))
    ratios = [
        f"{column} {statistics.median(orbax[column]) / statistics.median(results['ours'][column]):.1f}x"
        for column in ("blocked", "durable", "restore")
    ]
    lines.append("Orbax default / ours: " + ", ".join(ratios))
    return "\n".join(lines)


def work(args: argparse.Namespace, index: int, port: str) -> None:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_platforms", "cpu")
    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", args.processes, index)
    leaves, size = SHAPES[args.shape]
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rng = np.random.default_rng(7)
    whole = [rng.integers(0, 2**32, size // 4, dtype=np.uint32).view(np.float32) for _ in range(leaves)]
    state = {
        f"layer_{number:04d}": jax.make_array_from_callback(value.shape, sharding, lambda at, value=value: value[at])
        for number, value in enumerate(whole)
    }
    jax.block_until_ready(state)
    scratch = Path(args.directory)
    mine = b"".join(shard.data.tobytes() for leaf in state.values() for shard in leaf.addressable_shards)

    def together() -> None:
        if args.processes > 1:
            multihost_utils.sync_global_devices("bench")

    peers = {"ours": ours, "orbax": orbax_manager(True), "orbax, no zstd": orbax_manager(False)}
    results: dict[str, dict[str, list[float]]] = {
        name: {"blocked": [], "durable": [], "restore": []} for name in (*peers, "raw limit")
    }
    for number in range(args.rounds + 1):
        order = list(peers.items())
        for name, peer in order[number % len(order) :] + order[: number % len(order)]:  # nobody always goes first
            directory = scratch / f"{number}-{name.replace(' ', '')}"
            together()
            figures = peer(directory, state, together)
            if number:  # round 0 warms up
                for column, seconds in figures.items():
                    results[name][column].append(seconds)
            together()
            if index == 0:
                shutil.rmtree(directory, ignore_errors=True)
        together()
        seconds = raw(scratch / f"raw-{index}", mine, together)
        if number:
            results["raw limit"]["durable"].append(seconds)
    if index == 0:
        print(json.dumps(results), flush=True)


def ours(directory: Path, state: Any, together: Callable[[], None]) -> dict[str, float]:
    import orchestrator as oc

    agent = oc.Agent(directory, save=oc.every(1), options=oc.Options(on_save_failure="raise"))
    together()
    started = time.perf_counter()
    agent.save(1, state)
    blocked = time.perf_counter() - started
    agent.wait_until_finished()
    together()
    durable = time.perf_counter() - started
    started = time.perf_counter()
    restored = agent.restore(like=abstract(state))
    assert restored is not None
    ready(restored.state)
    together()
    restore = time.perf_counter() - started
    agent.close()
    return {"blocked": blocked, "durable": durable, "restore": restore}


def orbax_manager(compression: bool) -> Callable[[Path, Any, Callable[[], None]], dict[str, float]]:
    def run(directory: Path, state: Any, together: Callable[[], None]) -> dict[str, float]:
        import orbax.checkpoint as ocp

        handler = ocp.PyTreeCheckpointHandler(use_compression=compression)
        manager = ocp.CheckpointManager(directory, item_handlers=handler)
        together()
        started = time.perf_counter()
        manager.save(1, args=ocp.args.PyTreeSave(state))
        blocked = time.perf_counter() - started
        manager.wait_until_finished()
        together()
        durable = time.perf_counter() - started
        started = time.perf_counter()
        target = abstract(state)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        ready(manager.restore(1, args=ocp.args.PyTreeRestore(item=target, restore_args=restore_args)))
        together()
        restore = time.perf_counter() - started
        manager.close()
        return {"blocked": blocked, "durable": durable, "restore": restore}

    return run


def raw(path: Path, body: bytes, together: Callable[[], None]) -> float:
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    together()
    elapsed = time.perf_counter() - started
    path.unlink()
    return elapsed


def abstract(state: Any) -> Any:
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def ready(state: Any) -> None:
    import jax

    jax.block_until_ready(state)


if __name__ == "__main__":
    main()

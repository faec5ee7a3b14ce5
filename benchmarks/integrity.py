"""What checksums and fingerprints cost: saves and restores without them, with them, and with `attest`.

    python -m benchmarks.integrity                       # 2 processes, 512 MiB in 16 arrays, 7 rounds
    python -m benchmarks.integrity --shape=leaves        # 2000 leaves of 64 B

Rounds are interleaved; medians with the range, and each variant's ratio to the one without checksums. For that one, the
CRC-32C function of this process is replaced by one that returns 0 at once for large buffers, in writing and reading
alike: what it would cost if the chunks of large arrays had no checksums. Also prints the fingerprints' own rate on this
machine's devices.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import jobs
from benchmarks.shapes import SHAPES, build, here

VARIANTS = {"checksums off": "off", "checksums": "off", "attest=save": "save", "attest=full": "full"}
COLUMNS = ("blocked", "durable", "restore")
BULK_BYTES = 16 << 10  # chunks of the large arrays are above, records and the store's own nodes below


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("arrays", "leaves"), default="arrays")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--directory", type=jobs.directory, help="where to write (default: the system's temporary one)")
    parser.add_argument("--worker", nargs=3, metavar=("INDEX", "PORT", "PORT2"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args, int(args.worker[0]), args.worker[1])
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the workers are ended on the way out
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.directory) as scratch:
        arguments = [f"--{name}={getattr(args, name)}" for name in ("shape", "rounds", "processes")]
        result = jobs.run("benchmarks.integrity", [*arguments, f"--directory={scratch}"], args.processes)
    print(render(args, result))


def render(args: argparse.Namespace, result: dict[str, Any]) -> str:
    first = next(iter(result["rounds"]))
    lines = [
        f"{SHAPES[args.shape].title}, {args.processes} processes, {args.rounds} rounds: median ms (min to max), and",
        f"the median of each round's ratio to that round's `{first}`",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---|---|---|---|",
    ]
    base = result["rounds"][first]
    for name, columns in result["rounds"].items():
        cells = []
        for column in COLUMNS:
            values = [1000 * value for value in columns[column]]
            ratio = statistics.median(a / b for a, b in zip(columns[column], base[column], strict=True))
            cells.append(f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}), {ratio:.2f}x")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", f"Fingerprints alone, per process: {result['rate'] / 1e9:.1f} GB/s on {result['devices']}."]
    return "\n".join(lines)


def work(args: argparse.Namespace, index: int, port: str) -> None:
    import crc32c
    import jax
    from jax.experimental import multihost_utils

    import orchestrator as oc
    from orchestrator.arrays import fingerprint, flatten

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_platforms", "cpu")
    where = f"127.0.0.1:{port}"
    jax.distributed.initialize(where, args.processes, index, coordinator_bind_address=where)
    state = build(args.shape)

    def together() -> None:
        multihost_utils.sync_global_devices("bench")

    real = crc32c.crc32c

    def free(data: Any, value: int = 0) -> int:
        return 0 if len(data) >= BULK_BYTES else real(data, value)

    # Small leaves' chunks cannot be told from the store's own nodes, which must have their checksums.
    variants = [name for name in VARIANTS if args.shape != "leaves" or name != "checksums off"]
    rounds: dict[str, dict[str, list[float]]] = {name: {column: [] for column in COLUMNS} for name in variants}
    for number in range(args.rounds + 1):
        turn = number % len(variants)
        for name in variants[turn:] + variants[:turn]:
            directory = Path(args.directory) / f"{number}-{name.replace(' ', '')}"
            crc32c.crc32c = free if name == "checksums off" else real
            together()
            agent = oc.Agent(directory, options=oc.Options(on_save_failure="raise", attest=VARIANTS[name]))  # type: ignore[arg-type]
            together()
            times = [time.perf_counter()]
            agent.save(1, state)
            times.append(time.perf_counter())
            agent.wait_until_finished()
            together()
            times.append(time.perf_counter())
            restored = agent.restore(like=here(args.shape))
            assert restored is not None
            jax.block_until_ready(restored.state)
            together()
            ended = time.perf_counter()
            agent.close()
            if number:  # round 0 warms up
                spent = (times[1] - times[0], times[2] - times[0], ended - times[2])
                for column, seconds in zip(COLUMNS, spent, strict=True):
                    rounds[name][column].append(seconds)
            together()
            if index == 0:
                shutil.rmtree(directory, ignore_errors=True)
    flat = flatten(state)
    pairs = list(zip(flat.spec.leaves, flat.values, strict=True))
    fingerprint.start(pairs).result()
    own = sum(shard.data.nbytes for leaf in state.values() for shard in leaf.addressable_shards)
    seconds_each = []
    for _ in range(5):
        started = time.perf_counter()
        fingerprint.start(pairs).result()
        seconds_each.append(time.perf_counter() - started)
    if index == 0:
        devices = f"{jax.local_device_count()} {jax.local_devices()[0].platform} devices"
        print(
            json.dumps({"rounds": rounds, "rate": own / statistics.median(seconds_each), "devices": devices}),
            flush=True,
        )
    together()


if __name__ == "__main__":
    main()

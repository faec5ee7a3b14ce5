"""How costs grow: with leaves, bytes, live steps and journal entries. One process; medians of a few rounds.

    python -m benchmarks.growth                  # about two minutes

The slope is between the last two sizes, on logarithms: 1 means proportional, 0 constant. CPU time is the steadier
figure on a machine that does other work.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import journal
from orchestrator.catalog import Catalog
from orchestrator.layout import journal_key
from orchestrator.records import Event, LiveStep, encode
from orchestrator.storage import PosixStorage

LEAVES = (10, 100, 1000, 5000, 20_000)
MEGABYTES = (64, 256, 1024)
LIVE = (1, 10, 100, 1000)
ENTRIES = (1, 100, 1000, 10_000, 20_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=None)
    args = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    scratch = Path(tempfile.mkdtemp(prefix="growth-", dir=args.directory))
    try:
        for title, sizes, measure in (
            ("leaves of 64 B", LEAVES, lambda size, at: saves(size, 16, at)),
            ("MiB in 16 arrays", MEGABYTES, lambda size, at: saves(16, size << 14, at)),
            ("live steps, 1000 journal entries", LIVE, lambda size, at: openings(size, 1000, at)),
            ("journal entries, 100 live steps", ENTRIES, lambda size, at: openings(100, size, at)),
        ):
            table(title, sizes, measure, args.rounds, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(
    title: str, sizes: tuple[int, ...], measure: Callable[[int, Path], dict[str, float]], rounds: int, scratch: Path
) -> None:
    medians = []
    for size in sizes:
        found = [measure(size, scratch / f"{number}") for number in range(rounds + 1)][1:]  # the first warms up
        medians.append({name: statistics.median(one[name] for one in found) for name in found[0]})
    names = list(medians[0])
    print(f"| {title} | " + " | ".join(f"{name} ms" for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for size, median in zip(sizes, medians, strict=True):
        print(f"| {size} | " + " | ".join(f"{median[name] * 1000:.1f}" for name in names) + " |")
    stretch = math.log(sizes[-1] / sizes[-2])
    slopes = [math.log(medians[-1][name] / medians[-2][name]) / stretch for name in names]
    print("| slope | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |\n", flush=True)


def saves(leaves: int, elements: int, directory: Path) -> dict[str, float]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import orchestrator as oc

    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    values = np.random.default_rng(1).random(elements, np.float32)
    state: dict[str, Any] = {f"w{number}": jax.device_put(values, sharding) for number in range(leaves)}
    jax.block_until_ready(state)
    with oc.Agent(directory, options=oc.Options(on_save_failure="raise")) as agent:
        started, cpu = time.perf_counter(), time.process_time()
        agent.save(1, state)
        blocked = time.perf_counter() - started
        agent.wait_until_finished()
        durable, save_cpu = time.perf_counter() - started, time.process_time() - cpu
        started, cpu = time.perf_counter(), time.process_time()
        restored = agent.restore(state)
        assert restored is not None
        jax.block_until_ready(restored.state)
        restore, restore_cpu = time.perf_counter() - started, time.process_time() - cpu
    shutil.rmtree(directory)
    return {
        "blocked": blocked,
        "durable": durable,
        "restore": restore,
        "save's CPU": save_cpu,
        "restore's CPU": restore_cpu,
    }


def openings(live: int, entries: int, directory: Path) -> dict[str, float]:
    """Opening a run that has so many live steps and journal entries, and committing one more."""
    _journal(directory, live, entries)
    started = time.perf_counter()
    catalog = Catalog(PosixStorage(str(directory)), "growth")
    head = catalog.require_head()
    opened = time.perf_counter() - started
    assert len(head.live) == live
    started = time.perf_counter()
    catalog.append(journal.open_epoch)
    appended = time.perf_counter() - started
    shutil.rmtree(directory)
    return {"open": opened, "append": appended}


def _journal(directory: Path, live: int, entries: int) -> None:
    stamp = journal.Stamp("growth", 0.0, "0" * 32)
    first: Any = journal.open_epoch(None, stamp)
    steps = tuple(
        LiveStep(
            step=number,
            attempt="e0001-a01",
            manifest_crc32c="01234567",
            tree="89abcdef",
            bytes=1,
            metrics={"loss": 0.5},
            time=0.0,
        )
        for number in range(live)
    )
    for version in range(entries):
        # Only the newest is read; the others are as long as they would be.
        head = type(first)(
            format=1,
            version=version,
            epoch=1,
            writer="growth",
            write_id="0" * 32,
            time=0.0,
            event=Event(kind="committed", step=version),
            live=steps if version == entries - 1 else (),
        )
        path = directory / journal_key(version)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(head))


if __name__ == "__main__":
    main()

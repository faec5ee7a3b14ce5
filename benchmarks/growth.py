"""How costs grow: with leaves, bytes, processes, live steps and journal entries.

    python -m benchmarks.growth                          # about five minutes
    python -m benchmarks.growth --only bytes --sizes 64 256
    python -m benchmarks.growth --write=docs             # into docs/benchmark-tables.md and docs/growth.svg

Each size in processes of their own; medians of a few rounds, after one that warms up. What is done is deleted and
synced before the next begins. Of saves, the CPU time is that of all processes; it is the steadier figure on a machine
that does other work. A run is opened in a new process that has JAX up and the modules imported, and has read nothing of
it: `reader` is `oc.open_run(root).latest_step()`, `agent` is `oc.Agent(root)` and the opening of its epoch, as a job's
first restore does it, with its new journal entry.

The slope is between the last two sizes, on logarithms: 1 means proportional, 0 constant.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import curves, jobs, report
from benchmarks.worker import held_bytes, together, touch_free_memory

Figures = dict[str, float]


@dataclass(frozen=True)
class Series:
    """`title` has the size's unit first."""

    title: str
    sizes: tuple[int, ...]
    rounds: int


SERIES = {
    "leaves": Series("leaves of 64 B", (10, 100, 1000, 5000, 20_000), 3),
    "bytes": Series("MiB in 16 arrays", (64, 256, 1024, 4096, 8192), 3),
    "processes": Series("processes, 256 MiB in 16 arrays", (1, 2, 4, 8), 5),
    "processes-leaves": Series("processes, 2000 leaves of 64 B", (1, 2, 4, 8), 5),
    "live": Series("live steps, 1000 journal entries", (1, 10, 100, 1000), 5),
    "journal": Series("journal entries, 100 live steps", (1, 100, 1000, 10_000, 20_000), 5),
}
_MARK_EVERY = 500  # as the journal marks its own end for later readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--sizes", nargs="*", type=int, help="instead of the series' own")
    parser.add_argument("--rounds", type=int, default=0, help="default: the series' own")
    parser.add_argument(
        "--directory", type=jobs.directory, help="where to write (default: the system's temporary directory)"
    )
    parser.add_argument(
        "--write", metavar="DOCS", help="put tables and plot into this directory; every series, every size"
    )
    parser.add_argument("--worker", nargs=3, metavar=("INDEX", "PORT", "PORT2"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args, int(args.worker[0]), args.worker[1])
        return
    if args.write and (args.sizes or args.only != list(SERIES)):
        parser.error("--write: not with --only or --sizes, which leave out what the page shows")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the workers are ended on the way out
    tables, panels = [], []
    for name in args.only:
        series = SERIES[name]
        sizes = tuple(args.sizes or series.sizes)
        medians = [measure(name, size, args.rounds or series.rounds, args.directory) for size in sizes]
        tables.append(table(series.title, sizes, medians))
        print(tables[-1], flush=True)
        milliseconds = {column: [median[column] * 1000 for median in medians] for column in medians[0]}
        panels.append(curves.Panel(series.title, sizes, milliseconds))
    if args.write:
        report.put(args.write, "python -m benchmarks.growth --write=docs", "\n".join(tables))
        (Path(args.write) / "growth.svg").write_text(curves.draw(panels))


def table(title: str, sizes: Sequence[int], medians: Sequence[Figures]) -> str:
    names = list(medians[0])
    lines = [report.row([title, *(f"{name} ms" for name in names)]), report.row(["---"] * (len(names) + 1))]
    for size, median in zip(sizes, medians, strict=True):
        lines.append(report.row([str(size), *(f"{median[name] * 1000:.1f}" for name in names)]))
    if len(sizes) > 1:
        slopes = [curves.slope(sizes, [median[name] for median in medians]) for name in names]
        lines.append(report.row(["slope", *(f"{slope:.2f}" for slope in slopes)]))
    return "\n".join([*lines, ""])


def measure(name: str, size: int, rounds: int, directory: str | None) -> Figures:
    """Medians of a series at one size."""
    scratch = tempfile.mkdtemp(prefix="growth-", dir=directory)
    arguments = ["--only", name, "--sizes", str(size), "--rounds", str(rounds), "--directory", scratch]
    try:
        if name in ("live", "journal"):
            live, entries = (size, 1000) if name == "live" else (100, size)
            found = []
            for number in range(rounds):
                root = Path(scratch) / f"{number}"
                _journal(root, live, entries)
                found += jobs.run("benchmarks.growth", [*arguments[:-1], str(root)], 1)["rounds"]
                shutil.rmtree(root)
        else:
            found = jobs.run("benchmarks.growth", arguments, _processes(name, size))["rounds"]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.sync()
    return {column: statistics.median(one[column] for one in found) for column in found[0]}


def _processes(name: str, size: int) -> int:
    return size if name.startswith("processes") else 1


def work(args: argparse.Namespace, index: int, port: str) -> None:
    """One process of a job; process 0 prints the figures of each round."""
    import jax

    name, size = args.only[0], args.sizes[0]
    processes = _processes(name, size)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1 if name.startswith("processes") else 2)
    if processes > 1:
        where = f"127.0.0.1:{port}"
        jax.distributed.initialize(where, processes, index, coordinator_bind_address=where)
    if name in ("live", "journal"):
        found = [opening(args.directory)]
    else:
        leaves, elements = {
            "leaves": (size, 16),
            "bytes": (16, size << 14),
            "processes": (16, 256 << 14),
            "processes-leaves": (2000, 16),
        }[name]
        found, state = [], _state(leaves, elements)
        for number in range(args.rounds + 1):
            figures, state = saving(state, Path(args.directory) / f"{number}", processes)
            found += [figures] if number else []
    if index == 0:
        print(json.dumps({"rounds": found}), flush=True)
    os._exit(0)  # whatever threads there are


def saving(state: dict[str, Any], directory: Path, processes: int) -> tuple[Figures, dict[str, Any]]:
    """Empties `state`, the largest of which does not fit beside itself, and returns it as it was restored."""
    import jax

    import orchestrator as oc

    meet = together(processes)
    own_bytes = held_bytes(state)
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()
    }
    with oc.Agent(directory, options=oc.Options(on_save_failure="raise")) as agent:
        touch_free_memory(own_bytes)
        meet()
        started, cpu = time.perf_counter(), time.process_time()
        agent.save(1, state)
        blocked = time.perf_counter() - started
        agent.wait_until_finished()
        meet()
        durable, save_cpu = time.perf_counter() - started, time.process_time() - cpu
        state.clear()
        touch_free_memory(own_bytes)
        meet()
        started, cpu = time.perf_counter(), time.process_time()
        restored = agent.restore(targets)
        assert restored is not None
        jax.block_until_ready(restored.state)
        meet()
        restore, restore_cpu = time.perf_counter() - started, time.process_time() - cpu
    save_cpu, restore_cpu = _summed(save_cpu, restore_cpu)
    if jax.process_index() == 0:
        shutil.rmtree(directory)
        os.sync()
    meet()
    figures = {
        "blocked": blocked,
        "durable": durable,
        "restore": restore,
        "save's CPU": save_cpu,
        "restore's CPU": restore_cpu,
    }
    return figures, restored.state


def _state(leaves: int, elements: int) -> dict[str, Any]:
    """Incompressible and nowhere twice, over all devices."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    count = jax.device_count()
    sharding = NamedSharding(jax.make_mesh((count,), ("data",)), PartitionSpec("data"))
    block = np.random.default_rng(1).integers(0, 1 << 32, elements // count, np.uint32)

    def part(index: tuple[slice, ...], number: int) -> Any:
        return (block ^ np.uint32(number * elements + (index[0].start or 0))).view(np.float32)

    state = {
        f"w{number}": jax.make_array_from_callback((elements,), sharding, lambda index, at=number: part(index, at))
        for number in range(leaves)
    }
    jax.block_until_ready(state)
    return state


def _summed(*seconds: float) -> list[float]:
    """Over all processes."""
    import numpy as np
    from jax.experimental import multihost_utils

    every = multihost_utils.process_allgather(np.array([seconds], np.float32), tiled=True)
    return [float(total) for total in every.sum(axis=0)]


def opening(root: str) -> Figures:
    import jax

    import orchestrator as oc
    import orchestrator.agent
    import orchestrator.job.restore
    from orchestrator.rules import journal

    jax.devices()
    started = time.perf_counter()
    oc.open_run(root).latest_step()
    reader = time.perf_counter() - started
    started = time.perf_counter()
    agent = oc.Agent(root)
    agent._opening.by_restore(journal.tree_of(agent._store.head()))
    opened = time.perf_counter() - started
    agent.close()
    return {"reader": reader, "agent": opened}


def _journal(directory: Path, live: int, entries: int) -> None:
    """What so many entries have left behind; in the page cache, and nothing of it still to be written to disk."""
    from orchestrator.rules import journal
    from orchestrator.rules.codec import encode
    from orchestrator.rules.keys import index_key, journal_key
    from orchestrator.rules.records import JournalEvent, LiveStep

    first: Any = journal.open_epoch(None, journal.Stamp("growth", 0.0, "0" * 32))
    steps = tuple(
        LiveStep(
            step=number,
            attempt="e0001-a01",
            manifest_crc32c="01234567",
            tree="89abcdef",
            bytes=1,
            stored_metrics={"loss": 0.5},
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
            event=JournalEvent(kind="committed", step=version),
            live=steps if version == entries - 1 else (),
        )
        written = {journal_key(version): encode(head)}
        if version and version % _MARK_EVERY == 0:
            written[index_key(version)] = b""
        for key, body in written.items():
            path = directory / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
    os.sync()


if __name__ == "__main__":
    main()

"""Where the time of a restore onto an accelerator goes, beside the limits of each phase.

    python -m benchmarks.restore_phases                  # 3 GiB in 64 arrays, in the page cache; a minute
    python -m benchmarks.restore_phases --smoke          # on CPU devices, 64 MiB: only whether it runs

Rounds interleaved in one process; each figure is a line of JSON as soon as it is there, the medians come last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import crc32c
import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

import orchestrator as oc
from benchmarks import accelerator, jobs
from orchestrator.arrays import page_locked
from orchestrator.arrays.reading import buffers, host_ring, local_source, local_store

MIB = 1 << 20


class Phases:
    """Seconds of the main thread in each method of a ring."""

    NAMES = ("_prepare", "_allocated", "_place", "_reuse")

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        kept = {name: getattr(host_ring.HostRing, name) for name in self.NAMES}
        result = local_source._Batches.result
        for name, method in kept.items():
            setattr(host_ring.HostRing, name, self._timed(name, method))
        local_source._Batches.result = self._timed("wait for reads", result)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for name, method in kept.items():
                setattr(host_ring.HostRing, name, method)
            local_source._Batches.result = result  # type: ignore[method-assign]

    def _timed(self, name: str, method: Callable[..., Any]) -> Any:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - started

        return timed


class Measured:
    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self.args = args
        state = accelerator.build(args.bytes)
        self.target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()
        }
        self.agent = oc.Agent(directory / "ours", options=oc.Options(on_save_failure="raise"))
        self.agent.save(1, state)
        self.agent.wait_until_finished()
        self.raw = accelerator.Raw(directory / "raw")
        self.raw.save(state)
        self.raw.wait()
        self.raw._copies = []
        self.device = next(iter(next(iter(state.values())).sharding.device_set))
        shape, dtype, count = next(iter(state.values())).shape, next(iter(state.values())).dtype, len(state)
        self.ordinary = [np.ones(shape, dtype) for _ in range(count)]
        forms = [(self.device, shape, np.dtype(dtype))] * count
        started = time.perf_counter()
        self.locked = page_locked.ReusedArrays(0).take(forms)
        self.say("page-locked arrays made", ms=1000 * (time.perf_counter() - started), has=self.locked is not None)
        self.views = [page_locked.memory(array) for array in self.locked or ()]

    def say(self, figure: str, **values: Any) -> None:
        rounded = {name: round(value, 1) if isinstance(value, float) else value for name, value in values.items()}
        print(json.dumps({"figure": figure, **rounded}), flush=True)

    def ours(self, ring_bytes: int = 0, locked: bool = True, threads: int = 0, piece: int = 0) -> Any:
        kept = host_ring.BYTES, page_locked.PINNED_HOST, local_source._THREADS, local_store.PIECE_BYTES
        host_ring.BYTES, local_source._THREADS = ring_bytes or kept[0], threads or kept[2]
        local_store.PIECE_BYTES = piece or kept[3]
        page_locked.PINNED_HOST = kept[1] if locked else "no such memory"
        try:
            restored = self.agent.restore(like=self.target)
            assert restored is not None
            return restored.state
        finally:
            host_ring.BYTES, page_locked.PINNED_HOST, local_source._THREADS, local_store.PIECE_BYTES = kept

    def from_ordinary(self) -> Any:
        return jax.device_put(self.ordinary, [SingleDeviceSharding(self.device)] * len(self.ordinary))

    def from_locked(self) -> Any:
        return jax.device_put(self.locked, [SingleDeviceSharding(self.device)] * len(self.locked or ()))

    def read(self, threads: int, checked: bool, into: list[Any], piece: int = MIB) -> None:
        """The raw files, as ours reads its own: in pieces, each checked while it is in the cache."""

        def one(number: int) -> None:
            view = into[number].reshape(-1).view(np.uint8).data
            path = self.raw._paths[number % self.raw.FILES]
            descriptor = os.open(path, os.O_RDONLY)
            offset = number // self.raw.FILES * len(view)
            for first in range(0, len(view), piece):
                os.preadv(descriptor, [view[first : first + piece]], offset + first)
                if checked:
                    crc32c.crc32c(view[first : first + piece])
            os.close(descriptor)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(len(into))))

    def raw_locked(self) -> Any:
        self.read(8, False, self.views)
        return self.from_locked()


def ways(measured: Measured) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        "ours": measured.ours,
        "ours, ring of 128 MiB": lambda: measured.ours(128 * MIB),
        "ours, ring of 512 MiB": lambda: measured.ours(512 * MIB),
        "ours, 12 threads": lambda: measured.ours(threads=12),
        "ours, pieces of 256 KiB": lambda: measured.ours(piece=256 << 10),
        "ours, pieces of 4 MiB": lambda: measured.ours(piece=4 * MIB),
        "ours, pieces of 4 MiB, 12 threads": lambda: measured.ours(piece=4 * MIB, threads=12),
        "ours, ordinary memory": lambda: measured.ours(locked=False),
        "raw, ordinary memory": lambda: measured.raw.restore(measured.target),
        "copy from ordinary memory": measured.from_ordinary,
        "read by 8": lambda: measured.read(8, False, measured.ordinary),
        "read and check by 8": lambda: measured.read(8, True, measured.ordinary),
        "read and check by 12": lambda: measured.read(12, True, measured.ordinary),
        "read and check by 8, pieces of 256 KiB": lambda: measured.read(8, True, measured.ordinary, 256 << 10),
        "read and check by 8, pieces of 4 MiB": lambda: measured.read(8, True, measured.ordinary, 4 * MIB),
    }
    if measured.locked is not None:
        found["raw, page-locked"] = measured.raw_locked
        found["copy from page-locked"] = measured.from_locked
        found["read and check by 8 into page-locked"] = lambda: measured.read(8, True, measured.views)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=jobs.directory, help="where to write")
    parser.add_argument("--smoke", action="store_true", help="64 MiB and one round, on whatever device there is")
    args = parser.parse_args(arguments)
    args.bytes = 64 * MIB if args.smoke else int(args.gib * (1 << 30))
    args.rounds = 1 if args.smoke else args.rounds
    return args


def run(args: argparse.Namespace) -> None:
    kept = buffers.on_host
    if args.smoke:
        buffers.on_host = lambda sharding: False  # type: ignore[assignment]
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=args.directory))
    try:
        _measure(Measured(args, directory), args.rounds)
    finally:
        buffers.on_host = kept
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    run(parse())
    os._exit(0)


def _measure(measured: Measured, rounds: int) -> None:
    times: dict[str, list[float]] = {}
    phases = Phases()
    for number in range(rounds + 1):  # the first is of a fresh process
        for name, run in ways(measured).items():
            started = time.perf_counter()
            made = jax.block_until_ready(run())
            took_ms = 1000 * (time.perf_counter() - started)
            del made
            if number:
                times.setdefault(name, []).append(took_ms)
            else:
                measured.say("first", way=name, ms=took_ms)
    with phases.watched():
        jax.block_until_ready(measured.ours())
    measured.say("main thread of ours", **{name: 1000 * spent for name, spent in phases.spent.items()})
    for name, values in times.items():
        measured.say("median", way=name, ms=statistics.median(values), least=min(values), most=max(values))


if __name__ == "__main__":
    main()

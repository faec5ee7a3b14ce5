"""Saves and restores of a state on one accelerator, beside Orbax's CheckpointManager and PyTorch's DCP.

    python -m benchmarks.accelerator                     # 4 GiB in 64 arrays, 7 rounds
    python -m benchmarks.accelerator --write=docs        # into docs/benchmarks.md and -tables.md
    python -m benchmarks.accelerator --smoke             # on CPU devices, 64 MiB: only whether it runs

One process, one run, rounds interleaved. Beside what `benchmarks.compare` measures: `delay`, how much later a training
step that donates the whole state ends if it is dispatched right after `save`, since a save that returns before its
copies have been made may hold up what comes next. The raw limit copies the bytes to page-locked host memory, writes
them to four files at once and fsyncs them; it reads them into memory that it has, and copies them to the accelerator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's copy of the state is to fit, too

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import jobs, report
from benchmarks.peers import OrbaxDefault, OrbaxFiles, Ours, TorchDcp, installed
from benchmarks.worker import give_back, peak, reset_peak

ARRAYS = 64
COLUMNS = ("blocked", "delay", "durable", "restore")
COMMAND = "python -m benchmarks.accelerator --write=docs"
# What is measured of a peer in a process of its own, and its column's name.
ALONE = {"blocked": "first save blocked", "peak save": "peak save", "peak restore": "peak restore"}


class OrbaxTuned(OrbaxDefault):
    """A file for each chunk, no compression, page-locked host memory."""

    handler: ClassVar[dict[str, Any]] = {**OrbaxFiles.handler, "enable_pinned_host_transfer": True}


class TorchOnDevice(TorchDcp):
    def _placed(self, local: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.cuda() for name, tensor in local.items()}

    def prepare(self, state: dict[str, Any]) -> None:
        import torch

        super().prepare(state)
        torch.cuda.synchronize()

    def step(self) -> None:
        """What a step of an optimizer does to the state, in place."""
        import torch

        for tensor in self._state.values():
            tensor.add_(1)
        torch.cuda.synchronize()

    def restore(self, target: dict[str, Any]) -> Any:
        import torch

        super().restore(target)
        torch.cuda.synchronize()


class TorchOnDeviceAsync(TorchOnDevice):
    asynchronous = True


class Raw:
    FILES: ClassVar[int] = 4
    memory: ClassVar[list[Any]] = []  # what it reads into

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = [directory / str(number) for number in range(self.FILES)]

    def save(self, state: dict[str, Any]) -> None:
        """`blocked` is until the bytes are in page-locked memory."""
        self._copies = pinned(list(state.values()))

    def wait(self) -> None:
        with ThreadPoolExecutor(self.FILES) as pool:
            list(pool.map(self._write, range(self.FILES)))

    def _write(self, number: int) -> None:
        with self._paths[number].open("wb", buffering=0) as file:
            for copy in self._copies[number :: self.FILES]:
                raw = np.asarray(copy).reshape(-1).view(np.uint8).data
                for first in range(0, len(raw), 16 << 20):
                    file.write(raw[first : first + (16 << 20)])
            os.fsync(file.fileno())

    def restore(self, target: dict[str, Any]) -> Any:
        self._copies = []
        leaves = list(target.values())
        if not self.memory:
            self.memory[:] = [np.ones(leaf.shape, leaf.dtype) for leaf in leaves]
        with ThreadPoolExecutor(self.FILES) as pool:
            list(pool.map(self._read, range(self.FILES)))
        return jax.device_put(self.memory, [leaf.sharding for leaf in leaves])

    def _read(self, number: int) -> None:
        with self._paths[number].open("rb", buffering=0) as file:
            for array in self.memory[number :: self.FILES]:
                file.readinto(array.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        self._copies = []


PEERS: dict[str, type[Any]] = {
    "ours": Ours,
    "Orbax default": OrbaxDefault,
    "Orbax tuned": OrbaxTuned,
    "torch DCP": TorchOnDevice,
    "torch DCP async": TorchOnDeviceAsync,
    "raw limit": Raw,
}


def pinned(arrays: list[jax.Array]) -> list[jax.Array]:
    copies = jax.device_put(arrays, [array.sharding.with_memory_kind("pinned_host") for array in arrays])
    return list(jax.block_until_ready(copies))


def build(size: int) -> dict[str, Any]:
    """Random bits, on the accelerator."""
    shape = (size // ARRAYS // 4096, 1024)

    def bits(key: Any) -> Any:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint32), jnp.int32)

    make = jax.jit(bits, out_shardings=_sharding())
    return jax.block_until_ready({f"layer_{at:04d}": make(jax.random.key(at)) for at in range(ARRAYS)})


def _sharding() -> Any:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@jax.jit
def _same(leaf: Any, other: Any) -> Any:
    return (leaf == other).all()


_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)


def measure(kind: type[Any], directory: Path, state: dict[str, Any], memory: bool) -> tuple[dict[str, float], Any]:
    """Figures, and the state after one step of training."""
    peer = kind(directory)
    gc.collect()
    if hasattr(peer, "prepare"):
        peer.prepare(state)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    size = sum(leaf.nbytes for leaf in state.values())
    kept = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    alone = _stepped(peer, jax.tree.map(jnp.copy, state))[0]
    if memory:
        give_back(0)
    before, figures = reset_peak(), {}
    started = time.perf_counter()
    peer.save(state)
    figures["blocked"] = time.perf_counter() - started
    step_s, state = _stepped(peer, state)
    figures["delay"] = figures["blocked"] + step_s - alone
    peer.wait()
    figures["durable"] = time.perf_counter() - started
    figures["peak save"] = (peak() - before) / size
    if memory:
        give_back(0)
    before = reset_peak()
    started = time.perf_counter()
    restored = peer.restore(target)
    jax.block_until_ready(restored)
    figures["restore"] = time.perf_counter() - started
    figures["peak restore"] = (peak() - before) / size
    if isinstance(restored, dict) and not all(bool(_same(restored[name], leaf)) for name, leaf in kept.items()):
        raise SystemExit(f"{kind.__name__}: what was restored is not what was saved")
    peer.close()
    return figures, state


def _stepped(peer: Any, state: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds of one step, and the state after it."""
    jax.block_until_ready(state)
    started = time.perf_counter()
    if hasattr(peer, "step"):
        peer.step()
    else:
        state = jax.block_until_ready(_step(state))
    return time.perf_counter() - started, state


def rounds(args: argparse.Namespace, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Of the first save, in a worker: how long it blocks, and peaks of memory. Else the other figures of all rounds."""
    state, results = build(args.bytes), {name: dict[str, list[float]]() for name in names}
    for number in [0] if args.worker else range(args.rounds + 1):  # round 0 warms up
        for name in names[number % len(names) :] + names[: number % len(names)]:
            directory = Path(tempfile.mkdtemp(prefix="bench-", dir=args.directory))
            figures, state = measure(PEERS[name], directory / "run", state, bool(args.worker))
            shutil.rmtree(directory, ignore_errors=True)
            for column, value in figures.items():
                if args.worker and (column in ALONE):
                    results[name][ALONE[column]] = [value]
                elif number and column in COLUMNS:
                    results[name].setdefault(column, []).append(value)
    return results


def table(results: dict[str, dict[str, list[float]]], title: str) -> str:
    header = ["median ms (min to max)", *COLUMNS, *ALONE.values()]
    lines = [title, "", report.row(header), report.row(["---"] * len(header))]
    for name, had in results.items():
        cells = [report.times(had.get(column, [])) for column in (*COLUMNS, "first save blocked")]
        peaks = [report.median(had.get(column, []), "{:.2f}x") for column in ("peak save", "peak restore")]
        lines.append(report.row([name, *cells, *peaks]))
    said = []
    for name, had in results.items() if "ours" in results else ():
        if name != "ours":
            ratios = [(column, _ratio(had, results["ours"], column)) for column in COLUMNS]
            said.append(f"{name} / ours: " + ", ".join(f"{column} {ratio:.2f}x" for column, ratio in ratios))
    return "\n".join([*lines, "", "  \n".join(said), ""])


def medians(results: dict[str, dict[str, list[float]]], title: str) -> str:
    """The same in short: a row for each peer, without ranges and memory."""
    header = ["median ms", *COLUMNS]
    rows = [
        report.row([name, *(f"{statistics.median(had[column]) * 1000:.0f}" for column in COLUMNS)])
        for name, had in results.items()
    ]
    return "\n".join([title, "", report.row(header), report.row(["---"] * len(header)), *rows, ""])


def _ratio(had: dict[str, list[float]], ours: dict[str, list[float]], column: str) -> float:
    return statistics.median(had[column]) / statistics.median(ours[column])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--directory", type=jobs.directory, help="where to write (default: the system's temporary directory)"
    )
    parser.add_argument(
        "--write", metavar="DOCS", help="put tables into this directory's benchmarks.md and benchmark-tables.md"
    )
    parser.add_argument("--out", help="keep the raw figures in this file, as JSON")
    parser.add_argument("--smoke", action="store_true", help="64 MiB and one round, on whatever device there is")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="only these")
    parser.add_argument("--worker", nargs=3, metavar=("INDEX", "PORT", "PORT2"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.bytes = int(args.gib * (1 << 30))
    if args.smoke:
        args.bytes, args.rounds = 64 << 20, 1
    return args


def main() -> None:
    args = parse()
    device = jax.devices()[0]
    if device.platform == "cpu" and not args.smoke:
        sys.exit("benchmarks.accelerator: JAX finds no accelerator here (--smoke runs on CPU devices)")
    on_gpu = device.platform == "gpu"
    known = [name for name, peer in PEERS.items() if installed(peer) and (on_gpu or not name.startswith("torch"))]
    names = [name for name in known if not args.peers or name in args.peers]
    results = rounds(args, names)
    if args.worker:
        print(json.dumps(results), flush=True)
        os._exit(0)
    for name in names:
        if name != "raw limit":
            results[name] |= jobs.run("benchmarks.accelerator", [*sys.argv[1:], "--peers", name], 1)[name]
    title = f"**{args.bytes / (1 << 30):g} GiB in {ARRAYS} arrays on one {device.device_kind}**, {args.rounds} rounds"
    shown = table(results, title)
    print(shown, flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps({"title": title, "results": results}))
    if args.write:
        report.put(args.write, COMMAND, shown)
        report.put(args.write, COMMAND, medians(results, title), report.SUMMARY)
    os._exit(0)


if __name__ == "__main__":
    main()

"""One process of a benchmark job: every peer in turn, round by round. Started by `benchmarks.compare`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, float]


def work(args: argparse.Namespace, index: int, ports: list[str]) -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_platforms", "cpu")
    if args.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{ports[0]}", args.processes, index)
    from benchmarks import shapes
    from benchmarks.peers import peers_for

    peers = peers_for(args.shape)
    if args.peers:
        peers = {name: peers[name] for name in args.peers.split(",")}
    if any(name.startswith("torch") for name in peers):
        _torch(index, args.processes, ports[1])
    state = shapes.build(args.shape)
    targets = {"restore": shapes.here(state), "other mesh": shapes.elsewhere(state)}
    own_bytes = sum(shard.data.nbytes for leaf in state.values() for shard in leaf.addressable_shards)
    scratch = Path(args.directory)
    results: dict[str, dict[str, list[float]]] = {name: {} for name in peers}
    for number in range(0 if args.restore_only else args.rounds + 1):
        order = list(peers)
        for name in order[number % len(order) :] + order[: number % len(order)]:  # nobody always goes first
            keep = number == args.rounds and not name.startswith("torch")
            directory = scratch / (name.replace(" ", "-") if keep else f"{number}-{name}".replace(" ", "-"))
            figures = _round(peers[name], directory, state, targets, together(args.processes))
            peaks = {"peak save": figures.pop("peak save") / own_bytes}
            if "peak restore" in figures:  # what was restored is not extra
                peaks["peak restore"] = figures.pop("peak restore") / own_bytes - 1
            if args.memory:
                figures = peaks
            if number:  # round 0 warms up
                for column, value in figures.items():
                    results[name].setdefault(column, []).append(value)
            if index == 0 and not keep:
                shutil.rmtree(directory, ignore_errors=True)
    if args.restore_only:
        _restore_only(args, peers, state, targets["restore"], results)
    if index == 0:
        print(json.dumps(results), flush=True)
    os._exit(0)  # torch and jax each wait for the other's threads


def _torch(index: int, count: int, port: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=count)


def together(processes: int) -> Callable[[], None]:
    from jax.experimental import multihost_utils

    return (lambda: multihost_utils.sync_global_devices("bench")) if processes > 1 else (lambda: None)


def _round(kind: type[Any], directory: Path, state: Any, targets: Any, meet: Callable[[], None]) -> Figures:
    import jax

    peer = kind(directory)
    if hasattr(peer, "prepare"):
        peer.prepare(state)
    figures: Figures = {}
    meet()
    before = _reset_peak()
    started = time.perf_counter()
    peer.save(state)
    figures["blocked"] = time.perf_counter() - started
    peer.wait()
    meet()
    figures["durable"] = time.perf_counter() - started
    figures["peak save"] = float(_peak() - before)
    for name, target in targets.items():
        if name == "other mesh" and hasattr(peer, "prepare"):
            continue  # torch's targets and the raw file are as they were saved
        before = _reset_peak()
        started = time.perf_counter()
        restored = peer.restore(target)
        jax.block_until_ready(restored)
        meet()
        figures[name] = time.perf_counter() - started
        if name == "restore" and restored is not None:
            figures["peak restore"] = float(_peak() - before)
        del restored
    figures["bytes on disk"] = float(sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()))
    meet()
    peer.close()
    meet()
    return figures


def _restore_only(args: argparse.Namespace, peers: Any, state: Any, target: Any, results: Any) -> None:
    """What a job of another size reads of the last round."""
    import jax

    for number in range(args.rounds + 1):
        for name, kind in peers.items():
            directory = Path(args.directory) / name.replace(" ", "-")
            if name == "raw limit" or not directory.exists():
                continue
            peer = kind(directory)
            started = time.perf_counter()
            jax.block_until_ready(peer.restore(target))
            if number:
                results[name].setdefault("one process", []).append(time.perf_counter() - started)
            peer.close()


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

"""One process of a benchmark job: every peer in turn, round by round. Started by `benchmarks.compare`."""

from __future__ import annotations

import argparse
import ctypes
import gc
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
        where = f"127.0.0.1:{ports[0]}"
        jax.distributed.initialize(where, args.processes, index, coordinator_bind_address=where)
    from benchmarks import shapes
    from benchmarks.peers import peers_for

    peers = {name: peer for name, peer in peers_for(args.shape).items() if not args.peers or name in args.peers}
    if any(name.startswith("torch") for name in peers):
        _torch(index, args.processes, ports[1])
    results: dict[str, dict[str, list[float]]] = {name: {} for name in peers}
    if args.restore_only:
        _restore_only(args, peers, shapes.here(args.shape), results)
    else:
        _rounds(args, index, peers, results)
    if index == 0:
        print(json.dumps(results), flush=True)
    os._exit(0)  # torch and jax each wait for the other's threads


def _rounds(args: argparse.Namespace, index: int, peers: dict[str, type[Any]], results: Any) -> None:
    from benchmarks import shapes
    from benchmarks.peers import only

    scratch, order, shape, state = Path(args.directory), list(peers), "", {}
    for number in range(args.rounds + 1):  # round 0 warms up
        wanted = args.shape if number else shapes.SHAPES[args.shape].warm_up or args.shape
        if wanted != shape:
            shape, state = wanted, shapes.build(wanted)
            targets = {"restore": shapes.here(shape)} | ({} if args.memory else {"other mesh": shapes.elsewhere(shape)})
            own_bytes = held_bytes(state)
        for name in order[number % len(order) :] + order[: number % len(order)]:  # nobody always goes first
            keep = number == args.rounds and not name.startswith("torch") and not only(peers[name])
            directory = scratch / (name.replace(" ", "-") if keep else f"{number}-{name}".replace(" ", "-"))
            settle = give_back if args.memory else touch_free_memory
            figures = _round(peers[name], directory, state, targets, together(args.processes), settle)
            peaks = {"peak save": figures.pop("peak save") / own_bytes} if "peak save" in figures else {}
            if "peak restore" in figures:  # what was restored is not extra
                peaks["peak restore"] = figures.pop("peak restore") / own_bytes - 1
            for column, value in (peaks if args.memory else figures).items() if number else ():
                results[name].setdefault(column, []).append(value)
            if index == 0 and not keep:
                shutil.rmtree(directory, ignore_errors=True)


def _torch(index: int, count: int, port: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=count)


def together(processes: int) -> Callable[[], None]:
    from jax.experimental import multihost_utils

    return (lambda: multihost_utils.sync_global_devices("bench")) if processes > 1 else (lambda: None)


def _round(
    kind: type[Any],
    directory: Path,
    state: Any,
    targets: Any,
    meet: Callable[[], None],
    settle: Callable[[int], None],
) -> Figures:
    """`settle` gets the memory into the state in which it is to be, given how much may be needed."""
    from benchmarks.peers import only

    peer = kind(directory)
    # JAX lets go of a dropped array's host buffer when garbage is collected, and glibc keeps what was freed: what all
    # peers before have left of (d) would not fit into memory.
    give_back(0)
    if hasattr(peer, "prepare"):
        peer.prepare(state)
    figures: Figures = {}
    if hasattr(peer, "memcpy"):
        started = time.perf_counter()
        copies = peer.memcpy()
        figures["memcpy"] = time.perf_counter() - started
        del copies
    settle(2 * held_bytes(state))  # the files in the page cache, and a copy where a peer makes one
    meet()
    before = reset_peak()
    started = time.perf_counter()
    peer.save(state)
    figures["blocked"] = time.perf_counter() - started
    peer.wait()
    meet()
    figures["durable"] = time.perf_counter() - started
    figures["peak save"] = float(peak() - before)
    for name, target in targets.items():
        if name == "other mesh" and hasattr(peer, "prepare"):
            continue  # torch's targets and the raw file are as they were saved
        if only(peer) and name not in only(peer):
            continue
        gc.collect()
        settle(held_bytes(state))
        meet()
        before = reset_peak()
        restored = _restore(peer, name, target, meet, figures)
        if name == "restore" and restored is not None:
            figures["peak restore"] = float(peak() - before)
        del restored
    figures["bytes on disk"] = float(sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()))
    meet()
    peer.close()
    meet()
    return {column: value for column, value in figures.items() if column.startswith(only(peer) or "")}


def _restore(peer: Any, column: str, target: Any, meet: Callable[[], None], figures: Figures) -> Any:
    """Adds to `figures` the seconds, and the bytes read over those that this process needs."""
    import jax

    from benchmarks.shapes import needed_bytes

    needed, before = needed_bytes(target), _read_bytes()
    started = time.perf_counter()
    restored = peer.restore(target)
    jax.block_until_ready(restored)
    meet()
    figures[column] = time.perf_counter() - started
    figures[f"{column} read"] = (_read_bytes() - before) / needed
    if hasattr(peer, "reported_bytes"):
        figures[f"{column} reported"] = peer.reported_bytes / needed
    return restored


def _restore_only(args: argparse.Namespace, peers: Any, target: Any, results: Any) -> None:
    """What a job of another size reads of the last round."""
    from benchmarks.shapes import needed_bytes

    for number in range(args.rounds + 1):
        for name, kind in peers.items():
            directory = Path(args.directory) / name.replace(" ", "-")
            if name == "raw limit" or not directory.exists():
                continue
            peer, figures = kind(directory), Figures()
            touch_free_memory(needed_bytes(target))
            _restore(peer, "one process", target, together(1), figures)
            peer.close()
            for column, value in figures.items() if number else ():
                results[name].setdefault(column, []).append(value)


def held_bytes(state: dict[str, Any]) -> int:
    """On this process's devices."""
    return sum(shard.data.nbytes for leaf in state.values() for shard in leaf.addressable_shards)


def touch_free_memory(wanted_bytes: int) -> None:
    """Virtual machines give free pages back to their host, and then get them one fault at a time: without this, a save
    to the page cache was four times slower on them after a pause than after another save. Takes only what is free and
    leaves some of it, so that no cached file is dropped. To be called by all processes at about the same time."""
    import jax
    import numpy as np

    gc.collect()
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemFree:"))
    free_bytes = int(line.split()[1]) * 1024
    np.empty(min(wanted_bytes, free_bytes * 3 // 4 // jax.process_count()), np.uint8).fill(1)


def give_back(wanted_bytes: int) -> None:
    """What was freed goes back to the system, all of it: else it would hide what the next round needs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _read_bytes() -> int:
    """What this process has asked of read(2) and its like so far, cached or not; mapped files are not counted."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar:"))
    return int(line.split()[1])


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS")


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024

"""Requests to Cloud Storage per save, restore and opening, beside Orbax's CheckpointManager on the same emulator.

    python -m benchmarks.requests                    # 1, 4 and 8 processes; 16 leaves of 1 MiB and 2000 of 64 B
    python -m benchmarks.requests --processes=4 --leaves=16 --latency_ms=20

Class A are writes and listings, class B reads; deletes are free. Counted for the second save of a job, which is what
every later one costs. Each request is answered after `latency_ms`, so that seconds mean something, too.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from launch.gcs_emulator.process import EmulatorProcess
from launch.gcs_emulator.request_log import chain

BUCKET = "bench-bucket"
LEAF_BYTES = {8: 1 << 16, 16: 1 << 20, 2000: 64}
WORKER_LIMIT_S = 300
Phase = Callable[[str, Callable[[], None]], None]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--leaves", type=int, nargs="*", choices=sorted(LEAF_BYTES), default=[16, 2000])
    parser.add_argument("--latency_ms", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=5, metavar=("PEER", "INDEX", "COUNT", "PORT", "URL"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.worker:
        peer, index, count, port, url = args.worker
        work(PEERS[peer], int(index), int(count), port, url, args.leaves[0])
        return
    rows = []
    for count in args.processes:
        for leaves in args.leaves:
            for peer in PEERS:
                told = run(peer, count, leaves, args.latency_ms)
                rows.append({"peer": peer, "processes": count, "leaves": leaves, **told})
                if not args.json:
                    print(row(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows))


def run(peer: str, count: int, leaves: int, latency_ms: float, module: str = "benchmarks.requests") -> dict[str, Any]:
    """What process 0 measured, or `failed` with the reason. `module`: whose `--worker` does it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with EmulatorProcess([BUCKET], f"--faults=slow=1,slow_s={latency_ms / 1000}") as emulator:
        command = [sys.executable, "-m", module, f"--leaves={leaves}", "--worker", peer]
        workers = [
            subprocess.Popen(
                [*command, str(index), str(count), str(port), emulator.url],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]
        try:
            out, errors = workers[0].communicate(timeout=WORKER_LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"failed": f"no result within {WORKER_LIMIT_S} s"}
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
    line = next((line for line in out.splitlines() if line.startswith("{")), None)
    return json.loads(line) if line else {"failed": errors.strip().splitlines()[-1][:150] if errors else "no result"}


def row(told: dict[str, Any]) -> str:
    name = f"{told['processes']} processes, {told['leaves']:4} leaves, {told['peer']:5}"
    if "failed" in told:
        return f"{name}: {told['failed']}"
    parts = []
    for phase in ("open", "save", "restore"):
        one = told[phase]
        parts.append(f"{phase} {one['A']:3} A {one['B']:4} B {one['free']:3} free {one['seconds']:6.2f} s")
    return f"{name}: " + "; ".join(parts)


def work(peer: Callable[[Any, Phase], None], index: int, count: int, port: str, url: str, leaves: int) -> None:
    import os

    from launch.gcs_emulator.process import environ

    os.environ.update(environ(url))
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_platforms", "cpu")
    if count > 1:
        where = f"127.0.0.1:{port}"
        jax.distributed.initialize(where, count, index, coordinator_bind_address=where)
    sharding = NamedSharding(jax.make_mesh((count,), ("data",)), PartitionSpec("data"))
    rng = np.random.default_rng(7)
    values = [rng.random(LEAF_BYTES[leaves] // 4, dtype=np.float32) for _ in range(leaves)]
    state = {
        f"layer_{number:04d}": jax.make_array_from_callback(value.shape, sharding, lambda at, value=value: value[at])
        for number, value in enumerate(values)
    }
    told: dict[str, dict[str, Any]] = {}

    def together() -> None:
        if count > 1:
            multihost_utils.sync_global_devices("bench")

    def counted(phase: str, action: Callable[[], None]) -> None:
        together()
        if index == 0:
            ask(url, "DELETE")
        together()
        started = time.perf_counter()
        action()
        together()
        seconds = time.perf_counter() - started
        if index == 0:
            classes, log = ask(url, "GET")["classes"], ask(url, "GET", "requests")
            told[phase] = {kind: classes.get(kind, 0) for kind in ("A", "B", "free")}
            longest = chain(log)
            told[phase] |= {"seconds": seconds, "waves": len(longest)}
            told[phase] |= {"chain": [f"{one['operation']} {one['name'].rpartition('run/')[2]}" for one in longest]}
            told[phase] |= {"operations": Counter(one["operation"] for one in log if one["ended_s"] is not None)}
        together()

    peer(state, counted)
    if index == 0:
        print(json.dumps(told), flush=True)


def ask(url: str, method: str, what: str = "counts") -> Any:
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(f"{url}/_emulator/{what}", method=method), timeout=30) as reply:
        return json.loads(reply.read())


def ours(state: Any, counted: Phase) -> None:
    import jax

    import orchestrator as oc

    options = oc.Options(async_save=False, on_save_failure="raise")
    root = f"gs://{BUCKET}/ours"
    with oc.Agent(root, options=options) as agent:
        agent.save(1, state)
        counted("save", lambda: agent.save(2, state) and None)
        counted("restore", lambda: jax.block_until_ready(agent.restore(abstract(state)).state) and None)  # type: ignore[union-attr]
        if jax.process_index() == 0:
            time.sleep(1)  # the collector of this save has ended
        counted("open", lambda: oc.open_run(root).latest_step() and None if jax.process_index() == 0 else None)


def orbax_manager(state: Any, counted: Phase) -> None:
    import jax
    import orbax.checkpoint as ocp

    root = f"gs://{BUCKET}/orbax"

    def save(step: int) -> None:
        manager.save(step, args=ocp.args.PyTreeSave(state))
        manager.wait_until_finished()

    def restore() -> None:
        target = abstract(state)
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        jax.block_until_ready(manager.restore(2, args=arguments))

    def reopen() -> None:
        if jax.process_index() == 0:
            ocp.utils.checkpoint_steps(root)

    with ocp.CheckpointManager(root, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        save(1)
        counted("save", lambda: save(2))
        counted("restore", restore)
        counted("open", reopen)


PEERS: Mapping[str, Callable[[Any, Phase], None]] = {"ours": ours, "orbax": orbax_manager}


def abstract(state: Any) -> Any:
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


if __name__ == "__main__":
    main()

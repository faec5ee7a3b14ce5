"""Jobs on an emulated bucket whose requests are counted phase by phase: what `requests` and `waves` share."""

from __future__ import annotations

import argparse
import json
import os
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
Peer = Callable[[Any, Phase], None]


def parser(description: str | None, processes: list[int], latency_ms: float) -> argparse.ArgumentParser:
    """The flags that both have, with these defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--processes", type=int, nargs="*", default=processes)
    made.add_argument("--latency_ms", type=float, default=latency_ms)
    made.add_argument("--json", action="store_true")
    made.add_argument("--worker", nargs=5, metavar=("PEER", "INDEX", "COUNT", "PORT", "URL"), help=argparse.SUPPRESS)
    return made


def is_worker(args: argparse.Namespace, peers: Mapping[str, Peer], leaves: int) -> bool:
    """True if this process is one of a job's, and has done its part."""
    if not args.worker:
        return False
    peer, index, count, port, url = args.worker
    work(peers[peer], int(index), int(count), port, url, leaves)
    return True


def run(peer: str, count: int, leaves: int, latency_ms: float, module: str) -> dict[str, Any]:
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


def work(peer: Callable[[Any, Phase], None], index: int, count: int, port: str, url: str, leaves: int) -> None:
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
    measured: dict[str, dict[str, Any]] = {}

    def barrier() -> None:
        if count > 1:
            multihost_utils.sync_global_devices("bench")

    def counted(phase: str, action: Callable[[], None]) -> None:
        barrier()
        if index == 0:
            ask(url, "DELETE")
        barrier()
        started = time.perf_counter()
        action()
        barrier()
        seconds = time.perf_counter() - started
        if index == 0:
            classes, log = ask(url, "GET")["classes"], ask(url, "GET", "requests")
            measured[phase] = {kind: classes.get(kind, 0) for kind in ("A", "B", "free")}
            longest = chain(log)
            measured[phase] |= {"seconds": seconds, "waves": len(longest)}
            measured[phase] |= {"chain": [f"{one['operation']} {one['name'].rpartition('run/')[2]}" for one in longest]}
            measured[phase] |= {"operations": Counter(one["operation"] for one in log if one["ended_s"] is not None)}
        barrier()

    peer(state, counted)
    if index == 0:
        print(json.dumps(measured), flush=True)


def ask(url: str, method: str, what: str = "counts") -> Any:
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(f"{url}/_emulator/{what}", method=method), timeout=30) as reply:
        return json.loads(reply.read())


def abstract(state: Any) -> Any:
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)

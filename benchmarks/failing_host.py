"""One of four hosts cannot make its data durable (fsync says ENOSPC): when does each host know, and what does it know?

    python -m benchmarks.failing_host [--limit_s=60]

First with this package, then with Orbax's CheckpointManager: the same state, the same fault, injected by strace into
process 2. Prints a line for each host; one that has learned nothing by the limit is ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROCESSES, FAILING = 4, 2
START_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit_s", type=float, default=60)
    parser.add_argument("--worker", nargs=4, metavar=("KIND", "INDEX", "PORT", "ROOT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, index, port, root = args.worker
        work(kind, int(index), port, root, args.limit_s)
        return
    if shutil.which("strace") is None:
        sys.exit("benchmarks.failing_host: strace is needed")
    for kind in ("ours", "orbax"):
        with tempfile.TemporaryDirectory(prefix="failing-host-") as root:
            compare(kind, root, args.limit_s)


def compare(kind: str, root: str, limit_s: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    logs = [Path(root) / f"{index}.log" for index in range(PROCESSES)]
    started = []
    for index in range(PROCESSES):
        command = [sys.executable, "-m", "benchmarks.failing_host", f"--limit_s={limit_s}"]
        command += ["--worker", kind, str(index), port, root]
        if index == FAILING:
            trace = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=ENOSPC"]
            command = ["strace", "-D", "-f", "-qqq", "-o", os.devnull, *trace, *command]
        started.append(subprocess.Popen(command, stdout=logs[index].open("w"), stderr=subprocess.DEVNULL))
    give_up = time.monotonic() + START_S + limit_s
    try:
        # One that knows may end JAX's coordination service with itself, so all stay until everybody has spoken.
        while time.monotonic() < give_up and any(process.poll() is None for process in started):
            if all(newest_report(log) for log in logs):
                break
            time.sleep(0.2)
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait(10)
    for index, log in enumerate(logs):
        known = newest_report(log) or {"seconds": None, "text": "ended without a word"}
        seconds = "-" if known["seconds"] is None else f"{known['seconds']:.2f} s"
        print(f"{kind:6} host {index}: {seconds:>8}  {known['text'][:240]}", flush=True)


def newest_report(log: Path) -> dict[str, object] | None:
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"reported"')]
    return json.loads(lines[0]) if lines else None


def work(kind: str, index: int, port: str, root: str, limit_s: float) -> None:
    import faulthandler
    import threading

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    where = f"127.0.0.1:{port}"
    jax.distributed.initialize(where, PROCESSES, index, coordinator_bind_address=where)
    mesh = jax.make_mesh((PROCESSES,), ("data",))
    state = {"w": jnp.zeros((1024, 1024), device=NamedSharding(mesh, PartitionSpec("data")))}
    started = 0.0

    def report(text: str) -> None:
        seconds = time.monotonic() - started
        print(json.dumps({"reported": index, "seconds": seconds, "text": " ".join(text.split())}), flush=True)

    def limit() -> None:
        report(f"nothing yet; still waiting after {limit_s:g} s")

    timer = threading.Timer(limit_s, limit)
    timer.daemon = True
    faulthandler.enable()
    if kind == "ours":
        import orchestrator as oc

        with_raise = oc.Options(on_save_failure="raise", save_timeout_s=600)
        # Opened before the fault begins to matter: process 0 alone writes to open an epoch.
        agent = oc.Agent(f"{root}/run", options=with_raise)
        started = time.monotonic()
        timer.start()
        try:
            agent.save(0, state)
            agent.wait_until_finished()
            report("saved?")
        except oc.SaveFailed as error:
            report(str(error))
    else:
        import orbax.checkpoint as ocp

        manager = ocp.CheckpointManager(f"{root}/run")
        started = time.monotonic()
        timer.start()
        try:
            manager.save(0, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            report("saved?")
        except Exception as error:
            report(f"{type(error).__name__}: {error}")
    time.sleep(START_S + limit_s)  # ended from outside


if __name__ == "__main__":
    main()

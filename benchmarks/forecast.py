"""`python -m benchmarks.forecast`: what `orchestrator plan` foretells beside what real jobs then measure.

Saves a state of --mib MiB with 4 processes on data=4, restores it there a few times (that is what `plan` learns the
speed from), then for each mesh asks `plan` first and restores --rounds times after: medians. Every job is real
processes on this machine.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import app, flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("mib", 512, "size of the state")
flags.DEFINE_integer("rounds", 3, "restores on each mesh")

# (mesh, processes); what is saved is split over `data`, and a part of it over `model`.
MESHES = (("data=2,model=2", 2), ("data=1,model=4", 4), ("data=2,model=1", 1), ("data=8,model=1", 4))
SAVED = ("data=4,model=1", 4)


def worker(index: int, count: int, port: str, root: str, mesh_text: str, mib: int) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    import orchestrator as oc

    axes = {name: int(size) for name, size in (part.split("=") for part in mesh_text.split(","))}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", axes["data"] * axes["model"] // count)
    if count > 1:
        where = f"127.0.0.1:{port}"
        jax.distributed.initialize(where, count, index, coordinator_bind_address=where)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    specs = [PartitionSpec("data", "model"), PartitionSpec("data", None), PartitionSpec("model", "data")]
    shape = (2048, 2048)  # 16 MiB
    like = {
        f"w{number}": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs[number % 3]))
        for number in range(mib // 16)
    }
    with oc.Agent(root, options=oc.Options(async_save=False)) as agent:
        base = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        restored = agent.restore(like)
        print(json.dumps({"peak_bytes": memory("VmHWM") - base}), flush=True)
        if restored is None:
            state = {
                name: jax.jit(lambda at=number: jnp.full(shape, at, jnp.float32), out_shardings=leaf.sharding)()
                for number, (name, leaf) in enumerate(like.items())
            }
            agent.save(0, state)


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def job(root: str, mesh: str, processes: int, mib: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.forecast", f"--mib={mib}"]
    running = [
        subprocess.Popen(
            [*command, "worker", str(index), str(processes), port, root, mesh],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "ORCHESTRATOR_HOST_NAME": f"host-{index}"},
        )
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    return [json.loads(line) for output in outputs for line in output.splitlines() if line.startswith("{")]


def measure(root: str, mesh: str, processes: int, mib: int) -> dict[str, Any]:
    from orchestrator.observe.event_log import read
    from orchestrator.observe.events import StepRestored

    figures = job(root, mesh, processes, mib)
    events = Path(root) / "events"
    lines = [line for line in read(str(events)) if isinstance(line.event, StepRestored)]
    newest = [line.event for line in lines if line.epoch == max(line.epoch for line in lines)]
    return {
        "bytes": sum(event.read_bytes for event in newest),
        "peak": max(each["peak_bytes"] for each in figures),
        "seconds": max(event.elapsed_s for event in newest),
    }


def main(argv: list[str]) -> None:
    if argv[1:2] == ["worker"]:
        worker(int(argv[2]), int(argv[3]), argv[4], argv[5], argv[6], FLAGS.mib)
        return
    with tempfile.TemporaryDirectory(prefix="forecast-") as folder:
        root = f"{folder}/run"
        for _ in range(1 + FLAGS.rounds):  # saves, then restores
            job(root, *SAVED, FLAGS.mib)
        print(f"saved by {SAVED[1]} processes on {SAVED[0]}, {FLAGS.mib} MiB; forecast / measured")
        print(f"{'mesh':<16}{'processes':>9}  {'bytes':>23}  {'peak MiB':>17}  {'seconds':>17}")
        for mesh, processes in MESHES:
            command = [sys.executable, "-m", "orchestrator.cli", "plan", root, f"--mesh={mesh}", "--json"]
            done = subprocess.run([*command, f"--processes={processes}"], capture_output=True, text=True, check=True)
            plan = json.loads(done.stdout)
            rounds = [measure(root, mesh, processes, FLAGS.mib) for _ in range(FLAGS.rounds)]
            got = {name: statistics.median_low(each[name] for each in rounds) for name in rounds[0]}
            peak = max(host["peak_bytes"] for host in plan["hosts"])
            print(
                f"{mesh:<16}{processes:>9}  {plan['read_bytes']:>11} {got['bytes']:>11}  {peak >> 20:>5} "
                f"{got['peak'] >> 20:>5} {peak / got['peak'] - 1:>+5.0%}  {plan['seconds']:>5.2f} "
                f"{got['seconds']:>5.2f} x{plan['seconds'] / got['seconds']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)

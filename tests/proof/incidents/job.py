"""A rehearsal's job, under a launcher: it trains in lockstep, as a job does whose hosts compute together.

python -m tests.proof.incidents.job ROOT FOLDER key=value ...
    steps=N       train up to step N
    port=P        metrics_port of process 0; the others' follow it
    events=PATH   events_dir
    slow=S        on process 1 a file takes S seconds to become durable, from when FOLDER/slow is there
FOLDER is outside the run: pids, how far each host is, and the metrics files are in it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from launch import contract as contracts

STEP_S = 0.25
SAVE_EVERY = 20


class Lockstep:
    """What a collective is to its hosts: nobody leaves a step before all have come to it. Not one of JAX's own on this
    machine: those notice a lost peer at once, which those of an accelerator do not."""

    def __init__(self, folder: Path, index: int, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._mine = folder / str(index)
        self._others = [folder / str(other) for other in range(count) if other != index]

    def wait(self, step: int) -> None:
        self._mine.write_text(str(step))
        while any(self._reached(other) < step for other in self._others):
            time.sleep(0.01)

    def _reached(self, other: Path) -> int:
        try:
            return int(other.read_text() or -1)
        except FileNotFoundError:
            return -1


def slow_disk(seconds: float, switch: Path) -> None:
    """From when `switch` is there, what this process makes durable takes so long."""
    fsync = os.fsync

    def slowly(descriptor: int) -> None:
        if switch.exists():
            time.sleep(seconds)
        fsync(descriptor)

    os.fsync = os.fdatasync = slowly


def main() -> int:
    root, folder = sys.argv[1], Path(sys.argv[2])
    args = dict(item.split("=", 1) for item in sys.argv[3:])
    contract = contracts.from_environment(os.environ)
    assert isinstance(contract, contracts.JobContract), "start this under a launcher"
    index = contract.process_index
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"pid-{index}").write_text(str(os.getpid()))
    if args.get("slow") and index == 1:
        slow_disk(float(args["slow"]), folder / "slow")
    contracts.initialize(contract)
    lockstep = Lockstep(folder / f"restart-{contract.restart_count}", index, contract.process_count)
    return train(root, folder, index, args, lockstep)


def train(root: str, folder: Path, index: int, args: dict[str, str], lockstep: Lockstep) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import orchestrator as oc

    sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), PartitionSpec("data"))

    def state(step: int) -> dict[str, jax.Array]:
        whole = np.random.default_rng(step).random((256, 1024), np.float32)
        return {"w": jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at])}

    options = oc.Options(
        save_timeout_s=30,
        metrics_port=int(args["port"]) + index,
        metrics_file=str(folder / f"{index}.prom"),
        events_dir=args.get("events"),
    )
    like = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=sharding)}
    try:
        with oc.Agent(root, save=oc.every(SAVE_EVERY), keep=oc.last(3), options=options) as agent:
            restored = agent.restore(like)
            for step in range(restored.step + 1 if restored else 0, int(args.get("steps", 1_000_000))):
                time.sleep(STEP_S)
                lockstep.wait(step)
                agent.save(step, state(step), metrics={"loss": 1 / (step + 1)})
    except oc.OrchestratorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    contracts.leave(main())

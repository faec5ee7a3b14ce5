"""Processes that train with Orbax's v1 API, moved over: a lost save, objects that each process has its own of, a step
deleted; then one checkpoint, replaced.

python orbax_v1_job.py INDEX COUNT DEVICES PORT ROOT
Prints one JSON object a line.
"""

# ruff: noqa: E402  (JAX is configured from the arguments, so it is imported after them)
import json
import sys
from pathlib import Path

index, count, devices, port, root = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_platforms", "cpu")
where = f"127.0.0.1:{port}"
jax.distributed.initialize(where, count, index, coordinator_bind_address=where)

from orchestrator.compat import v1 as ocp

sharding = jax.sharding.NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), jax.sharding.PartitionSpec("x"))
abstract = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding), "step": 0}


def state(step):
    whole = np.arange(16, dtype=np.float32) + step
    return {"w": jax.make_array_from_callback((16,), sharding, lambda part: whole[part]), "step": step}


def is_of(loaded, step):
    parts = [(each.data, np.arange(16)[each.index] + step) for each in loaded["w"].addressable_shards]
    return all(np.array_equal(*both) for both in parts) and loaded["step"] == step


class Position:
    """Each process writes a file of its own."""

    def __init__(self, at):
        self.at = at

    async def save(self, directory):
        async def write():
            (await directory.await_creation() / f"position-{index}").write_text(str(self.at))

        return write()

    async def load(self, directory):
        async def read():
            self.at = int((directory / f"position-{index}").read_text())

        return read()


with ocp.training.Checkpointer(root / "run") as checkpointer:
    responses = []
    for step in range(4):  # the save of step 1 fails, by the environment
        given = {"state": state(step), "data": Position(100 * index + step)}
        responses.append(checkpointer.save_checkpointables_async(step, given, force=True))
    results = [each.result(timeout=60) for each in responses]
    position = Position(-1)
    loaded = checkpointer.load_checkpointables(None, {"state": abstract, "data": position})
    checkpointer.delete(2)
    steps = [each.step for each in checkpointer.checkpoints]
    files = sorted(path.name for path in (root / "run" / "3" / "data").iterdir())

ocp.save(root / "one", state(0))
ocp.save_async(root / "one", state(5), overwrite=True).result()
told = {
    "results": results,
    "whole": is_of(loaded["state"], 3),
    "position": position.at,
    "steps": steps,
    "files": files,
    "replaced": is_of(ocp.load(root / "one", abstract), 5),
    "sharding": ocp.load(root / "one")["w"].sharding == sharding,
}
print(json.dumps({"event": "done", **told}), flush=True)

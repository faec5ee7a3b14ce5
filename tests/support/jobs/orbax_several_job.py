"""Processes that train with Orbax's CheckpointManager, moved over: an item of a handler of the program's own, of which
each process has a part; step directories, read while training goes on; a save whenever the last one has ended.

python orbax_several_job.py INDEX COUNT DEVICES PORT ROOT
Prints one JSON object a line.
"""

# ruff: noqa: E402  (JAX is configured from the arguments, so it is imported after them)
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

index, count, devices, port, root = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_platforms", "cpu")
where = f"127.0.0.1:{port}"
jax.distributed.initialize(where, count, index, coordinator_bind_address=where)

import orchestrator.compat as ocp

sharding = jax.sharding.NamedSharding(jax.make_mesh((jax.device_count(),), ("x",)), jax.sharding.PartitionSpec("x"))
abstract = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}


def state(step):
    whole = np.arange(16, dtype=np.float32) + step
    return {"w": jax.make_array_from_callback((16,), sharding, lambda part: whole[part])}


def is_of(loaded, step):
    parts = [(each.data, np.arange(16)[each.index] + step) for each in loaded["w"].addressable_shards]
    return all(np.array_equal(*both) for both in parts)


class LoaderHandler(ocp.CheckpointHandler):
    """A file of each process, and one that process 0 writes for all."""

    def save(self, directory, args):
        (directory / f"loader-{index}.txt").write_text(args.position)
        if index == 0:
            (directory / "shared.txt").write_text("of all")

    def restore(self, directory, args):
        return (directory / f"loader-{index}.txt").read_text(), (directory / "shared.txt").read_text()


@ocp.args.register_with_handler(LoaderHandler, for_save=True)
@dataclass
class LoaderSave(ocp.args.CheckpointArgs):
    position: str


@ocp.args.register_with_handler(LoaderHandler, for_restore=True)
@dataclass
class LoaderRestore(ocp.args.CheckpointArgs):
    pass


def save(manager, step, **more):
    items = {"state": ocp.args.StandardSave(state(step)), "loader": LoaderSave(f"{index} at {step}")}
    return manager.save(step, args=ocp.args.Composite(**items), **more)


def views(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.isdecimal())


policies = ocp.checkpoint_managers
options = ocp.CheckpointManagerOptions(
    save_decision_policy=policies.ContinuousCheckpointingPolicy(minimum_interval_secs=0),
    preservation_policy=policies.LatestN(2),
)
told = {}
with ocp.CheckpointManager(root / "run", options=options) as manager:
    saved = []
    for step in range(40):  # a step of training takes no time: some find the last save still running
        saved.append(save(manager, step))
        if step % 8 == 7:
            manager.wait_until_finished()
    manager.wait_until_finished()
    told["continuous"] = [step for step, was in enumerate(saved) if was]
    told["steps"] = list(manager.all_steps())
    save(manager, 50, force=True)
    manager.wait_until_finished()
    newest = manager.directory / "50"
    told["views"] = views(Path(manager.directory))
    told["loader_files"] = sorted(path.name for path in (newest / "loader").iterdir())
    asked = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), loader=LoaderRestore())
    found = manager.restore(50, args=asked)
    told["whole"], told["loader"] = is_of(found["state"], 50), list(found["loader"])
    manager.delete(50)
    told["deleted"] = views(Path(manager.directory))

with ocp.CheckpointManager(root / "run", options=options) as manager:  # the job comes back
    told["again"] = manager.latest_step() == told["steps"][-1] and save(manager, 60, force=True)
    manager.wait_until_finished()
    told["end"] = views(Path(manager.directory))

best = ocp.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["loss"], best_mode="min")
told["best"] = []
with ocp.CheckpointManager(root / "best", options=best) as manager:
    for step, loss in enumerate([2.0, 3.0, 1.0, 4.0]):
        manager.save(step, args=ocp.args.StandardSave(state(step)), metrics={"loss": loss})
        manager.wait_until_finished()
        told["best"].append([manager.latest_step(), *manager.all_steps()])
    time.sleep(index)  # one that is behind must find the step that all are about to delete
    if 2 in manager.all_steps():
        manager.delete(2)
    told["best"].append([manager.latest_step(), *manager.all_steps()])
print(json.dumps({"event": "done", **told}), flush=True)

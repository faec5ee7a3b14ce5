"""A loop written for Orbax, moved over by its one import; `--with_orbax` runs it with the real one, for comparison.

orchestrator launch local --processes 2 -- python train.py --root=/tmp/run --steps=20
"""

import argparse
import os
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import orchestrator as oc
import orchestrator.compat as ocp


def main(root: str, steps: int, ocp: ModuleType = ocp) -> dict[str, object]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    train_step = jax.jit(lambda state: {"w": state["w"] * 0.9 + 0.1, "count": state["count"] + 1})

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    with ocp.CheckpointManager(os.path.abspath(root), options=options) as manager:
        state = {"w": jax.device_put(jnp.arange(64.0).reshape(16, 4), rows), "count": jax.device_put(0, whole)}
        start = 0
        if manager.latest_step() is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
            restored = manager.restore(manager.latest_step(), args=arguments)
            state, start = restored.state, restored.data["next"]
        for step in range(start, steps):
            state = train_step(state)
            items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave({"next": step + 1})}
            manager.save(step, args=ocp.args.Composite(**items), force=step == steps - 1)
        manager.wait_until_finished()
        latest = manager.latest_step()
    return {"start": start, "sum": float(jnp.sum(state["w"])), "count": int(state["count"]), "latest": latest}


if __name__ == "__main__":
    oc.initialize()  # joins the other processes under a launcher; does nothing when alone
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--with_orbax", action="store_true")
    flags = parser.parse_args()
    if flags.with_orbax:
        import orbax.checkpoint

        print(main(flags.root, flags.steps, orbax.checkpoint), flush=True)
    else:
        print(main(flags.root, flags.steps), flush=True)

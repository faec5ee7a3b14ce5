"""Plain JAX: a state that is a dict of arrays, on all devices of the job.

python train.py --root=/tmp/run --steps=20     # again with more steps: it resumes
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import orchestrator as oc


def main(root: str, steps: int) -> dict[str, object]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    like = {
        "w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=rows),
        # Without a sharding it would come back on the first device alone, and not go with the rest into `train_step`.
        "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=whole),
    }

    @functools.partial(jax.jit, out_shardings={"w": rows, "key": whole})  # on the devices of all hosts
    def init():
        return {"w": jnp.zeros((16, 4)), "key": jax.random.key(0)}

    @jax.jit
    def train_step(state):
        key, noise = jax.random.split(state["key"])
        target = 1.0 + 0.1 * jax.random.normal(noise, (16, 4))
        loss = jnp.mean((state["w"] - target) ** 2)
        return {"w": state["w"] - 0.1 * (state["w"] - target), "key": key}, loss

    with oc.Agent(root, save=oc.every(5) | oc.auto(max_loss_s=60), keep=oc.last(3) | oc.best("loss")) as agent:
        restored = agent.restore(like)  # on this mesh, whatever mesh it was saved on
        state, start = (restored.state, restored.step + 1) if restored else (init(), 0)
        loss = jnp.float32(0)
        for step in range(start, steps):
            state, loss = train_step(state)
            agent.save(step, state, metrics={"loss": loss}, force=step == steps - 1)
            if agent.reached_preemption(step):
                break
    return {"start": start, "loss": float(loss), "sum": float(jnp.sum(state["w"]))}


if __name__ == "__main__":
    oc.initialize()  # joins the other processes under a launcher; does nothing when alone
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=20)
    print(main(**vars(parser.parse_args())), flush=True)

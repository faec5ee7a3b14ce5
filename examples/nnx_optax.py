"""Flax NNX and Optax: modules and optimizer are objects; what is saved is their state.

python train.py --root=/tmp/run --steps=20     # again with more steps: it resumes
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import orchestrator as oc


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)  # its random state is part of the module's

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](self.dropout(nnx.relu(self.layers[0](x))))


def make() -> tuple[Model, nnx.Optimizer]:
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def main(root: str, steps: int) -> dict[str, object]:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    graph, abstract = nnx.split(nnx.eval_shape(make))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), abstract)

    @jax.jit
    def train_step(state, x, y):
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    with oc.Agent(root, save=oc.every(5), keep=oc.last(2)) as agent:
        restored = agent.restore(like)
        if restored:
            state, start = restored.state, restored.step + 1
        else:
            state, start = jax.jit(lambda: nnx.state(make()), out_shardings=everywhere)(), 0
        loss = jnp.float32(0)
        for step in range(start, steps):
            x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (16, 8))
            state, loss = train_step(state, x, jnp.sum(x, axis=1, keepdims=True))
            agent.save(step, state, metrics={"loss": loss}, force=step == steps - 1)
            if agent.reached_preemption(step):
                break
    model, _ = nnx.merge(graph, state)
    model.dropout.deterministic = True
    return {"start": start, "loss": float(loss), "out": float(model(jnp.ones((1, 8)))[0, 0])}


if __name__ == "__main__":
    oc.initialize()  # joins the other processes under a launcher; does nothing when alone
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=20)
    print(main(**vars(parser.parse_args())), flush=True)

"""Flax Linen and Optax: a TrainState with dropout keys, sharded by the model's own annotations.

python train.py --root=/tmp/run --steps=20     # again with more steps: it resumes
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from jax.sharding import AxisType

import orchestrator as oc


class TrainState(train_state.TrainState):
    dropout_key: Any


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        columns = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.relu(nn.Dense(32, kernel_init=columns)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(1)(x)


def main(root: str, steps: int) -> dict[str, object]:
    mesh = jax.make_mesh((1, jax.device_count()), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    model, optimizer = Model(), optax.adamw(optax.cosine_decay_schedule(1e-2, 100))

    def init(key):
        params = model.init(key, jnp.ones((1, 8)), train=False)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer, dropout_key=key)

    boxed = jax.eval_shape(init, jax.random.key(0))  # each parameter in a box that names its mesh axes
    shardings = nn.get_sharding(boxed, mesh)
    like = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )

    @jax.jit
    def train_step(state, x, y):
        def loss_of(params):
            key = jax.random.fold_in(state.dropout_key, state.step)
            out = state.apply_fn({"params": params}, x, train=True, rngs={"dropout": key})
            return jnp.mean((out - y) ** 2)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    with oc.Agent(root, save=oc.every(5), keep=oc.last(2)) as agent:
        restored = agent.restore(like)
        if restored:
            state, start = restored.state, restored.step + 1
        else:
            state = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(jax.random.key(0))
            start = 0
        loss = jnp.float32(0)
        for step in range(start, steps):
            x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (16, 8))
            state, loss = train_step(state, x, jnp.sum(x, axis=1, keepdims=True))
            agent.save(step, state, metrics={"loss": loss}, force=step == steps - 1)
            if agent.reached_preemption(step):
                break
    return {"start": start, "loss": float(loss), "step": int(state.step)}


if __name__ == "__main__":
    oc.initialize()  # joins the other processes under a launcher; does nothing when alone
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=20)
    print(main(**vars(parser.parse_args())), flush=True)

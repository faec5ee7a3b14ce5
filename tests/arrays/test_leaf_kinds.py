"""Every kind of leaf that a state may have comes back bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax
import flax.nnx
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orchestrator as oc
from orchestrator.arrays import jax_internals
from tests.support.leaf_values import DTYPES, REJECTED_DTYPES, X64_DTYPES, bits, came_back, every_pattern, same


def test_every_dtype_of_jax_and_every_bit_pattern_comes_back(agent: oc.Agent) -> None:
    state = {name: jnp.asarray(every_pattern(name)) for name in DTYPES}
    assert [str(array.dtype) for array in state.values()] == DTYPES
    same(came_back(agent, state), state)


def test_the_list_of_dtypes_is_all_that_jax_has() -> None:
    known = {scalar.dtype.name for scalar in vars(jnp).values() if isinstance(scalar, type(jnp.float32))}
    no_arrays_of = {"float6_e2m3fn", "float6_e3m2fn"}  # names without arrays on any platform that we can try
    assert known - no_arrays_of - {*REJECTED_DTYPES} == {*DTYPES, *X64_DTYPES}


def test_64_bit_dtypes_come_back_under_x64(agent: oc.Agent) -> None:
    with jax_internals.enable_x64():
        state = {name: jnp.asarray(every_pattern(name)) for name in X64_DTYPES}
        assert [str(array.dtype) for array in state.values()] == X64_DTYPES
        same(came_back(agent, state), state)


def test_numpy_arrays_and_scalars_come_back_as_numpy(agent: oc.Agent) -> None:
    arrays = {name: every_pattern(name) for name in (*DTYPES, *X64_DTYPES)}
    scalars = {f"{name} scalar": array[1] for name, array in arrays.items()}
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    shapes = {
        "0-d": np.array(3.5),
        "fortran": np.asfortranarray(base),
        "strided": base[::2, ::-3],
        "transposed": base.T,
        "big endian": np.arange(5, dtype=">f4"),
        "read-only": np.broadcast_to(np.float32(1), (3, 4)),
    }
    got = came_back(agent, {**arrays, **scalars, **shapes})
    same({**got, "big endian": got["big endian"].astype(">f4")}, {**arrays, **scalars, **shapes})
    assert isinstance(got["int8"], np.ndarray) and isinstance(got["int8 scalar"], np.int8)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_prng_keys_come_back_and_draw_the_same_numbers(agent: oc.Agent, impl: str) -> None:
    key = jax.random.key(7, impl=impl)
    state = {"one": key, "many": jax.random.split(key, 6).reshape(2, 3)}
    got = came_back(agent, state)
    same(got, state)
    assert bits(jax.random.normal(got["one"], (4,))) == bits(jax.random.normal(key, (4,)))


def test_python_values_come_back_exactly_with_their_types(agent: oc.Agent) -> None:
    state = {
        "ints": [0, -1, 2**31, 2**63 - 1, 2**63, -(2**200)],
        "floats": [0.0, -0.0, 0.1, 5e-324, float("inf"), float("-inf"), float("nan")],
        "complex": [1 + 2j, complex(-0.0, float("inf"))],
        "bools": [True, False],
        "strings": ["", "plain", "ü \u2028 \0 \U0001f680", "x" * 10_000],
        "bytes": [b"", b"\0\xff" * 300],
        "none": None,
    }
    got = came_back(agent, state)
    same(got, state)
    assert got["none"] is None


def test_empty_containers_and_arrays_without_elements_come_back(agent: oc.Agent) -> None:
    state = {
        "dict": {},
        "list": [],
        "tuple": (),
        "nested": [{}, ((), [None])],
        "zero": jnp.zeros((0, 3), jnp.bfloat16),
        "numpy zero": np.zeros((2, 0), np.int16),
        "no keys": jax.random.split(jax.random.key(0), 3)[:0],
        "full": jnp.ones(2),
    }
    same(came_back(agent, state), state)


@pytest.mark.parametrize("state", [jnp.arange(3.0), 7, np.float32(2), "text", {"only": None}])
def test_a_state_may_be_a_single_leaf(agent: oc.Agent, state: Any) -> None:
    same(came_back(agent, state), state)


@pytest.mark.parametrize("state", [{}, [], (), None])
def test_a_state_without_leaves_is_rejected(agent: oc.Agent, state: Any) -> None:
    with pytest.raises(oc.UnsupportedLeaf, match="no leaves"):
        agent.save(0, state)


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Inner:
    weight: Any
    pair: Pair


@flax.struct.dataclass
class Outer:
    inner: Inner
    steps: tuple[Any, ...]


def test_named_tuples_and_dataclasses_come_back_as_themselves(agent: oc.Agent) -> None:
    state = Outer(Inner(jnp.ones((2, 2)), Pair(1, jnp.arange(3))), (jnp.zeros(()), None))
    got = came_back(agent, state)
    assert isinstance(got.inner.pair, Pair)
    same(got, state)


def test_a_flax_linen_train_state_with_optax_comes_back_and_trains_on(agent: oc.Agent) -> None:
    params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 100)))
    state = flax.training.train_state.TrainState.create(apply_fn=lambda: None, params=params, tx=optimizer)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    state = state.replace(step=jnp.asarray(state.step))  # as a jitted train step returns it
    got = came_back(agent, state, like=jax.eval_shape(lambda: state))
    assert got.step == 1
    same(got.params, state.params)
    same(got.opt_state, state.opt_state)
    grads = jax.tree.map(jnp.ones_like, params)
    same(got.apply_gradients(grads=grads).params, state.apply_gradients(grads=grads).params)


@pytest.mark.parametrize(("saved", "like"), [(0, jax.ShapeDtypeStruct((), jnp.int32)), (jnp.int32(7), 0)])
def test_flaxs_fresh_step_0_and_the_jitted_steps_array_stand_for_each_other(
    agent: oc.Agent, saved: Any, like: Any
) -> None:
    """TrainState.create makes `step` an int; eval_shape of it, and every jitted train step, make it an array."""
    assert came_back(agent, {"step": saved}, like={"step": like}) == {"step": saved}


def test_flax_nnx_state_comes_back_into_an_abstract_model(agent: oc.Agent) -> None:
    class Model(flax.nnx.Module):
        def __init__(self, rngs: flax.nnx.Rngs) -> None:
            self.linear = flax.nnx.Linear(3, 2, rngs=rngs)
            self.norm = flax.nnx.BatchNorm(2, rngs=rngs)
            self.dropout = flax.nnx.Dropout(0.5, rngs=rngs)

    _, state = flax.nnx.split(Model(flax.nnx.Rngs(0)))
    graph, abstract = flax.nnx.split(flax.nnx.eval_shape(lambda: Model(flax.nnx.Rngs(0))))
    got = came_back(agent, state, like=abstract)
    same(jax.tree.leaves(got), jax.tree.leaves(state))
    x = jnp.ones((1, 3))
    assert bits(flax.nnx.merge(graph, got).linear(x)) == bits(Model(flax.nnx.Rngs(0)).linear(x))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.multi_transform({"a": optax.adam(1e-3), "b": optax.set_to_zero()}, {"w": "a", "b": "b"}),
        optax.MultiSteps(optax.adam(1e-3), 4),
        optax.contrib.schedule_free_adamw(1e-3),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        optax.apply_if_finite(optax.lion(1e-3), 3),
    ],
    ids=["adamw", "multi_transform", "MultiSteps", "schedule_free", "inject_hyperparams", "apply_if_finite"],
)
def test_optax_states_come_back(agent: oc.Agent, optimizer: Any) -> None:
    params = {"w": jnp.ones((4, 2), jnp.bfloat16), "b": jnp.ones(2)}
    _, state = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    same(came_back(agent, state), state)

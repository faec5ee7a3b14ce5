"""What goes into a checkpoint comes out of it, bit for bit, and nothing else can get in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.nnx
import flax.training.train_state
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter, WriteStopped
from orchestrator.arrays.tree import flatten
from tests.support.runs import merge_alone
from tests.support.snapshots import snapshot

FLOATS_8 = "e3m4 e4m3 e4m3b11fnuz e4m3fn e4m3fnuz e5m2 e5m2fnuz e8m0fnu"
DTYPES = [
    *("bool", "int2", "int4", "int8", "int16", "int32", "uint2", "uint4", "uint8", "uint16", "uint32"),
    *("float4_e2m1fn", *(f"float8_{name}" for name in FLOATS_8.split())),
    *("bfloat16", "float16", "float32", "complex64"),
]
REJECTED_DTYPES = ["int1", "uint1"]  # TensorStore has nothing of that width
X64_DTYPES = ["int64", "uint64", "float64", "complex128"]


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def every_pattern(name: str) -> np.ndarray[Any, Any]:
    """Values of a dtype: all bit patterns up to 16 bits, else random ones and the awkward ones of IEEE 754."""
    dtype = numpy_dtype(name)
    if name == "bool":
        return np.array([True, False])
    if name.endswith("int2") or name.endswith("int4"):
        bits = int(name[-1])
        low = 0 if name.startswith("u") else -(2 ** (bits - 1))
        return np.arange(low, low + 2**bits).astype(dtype)
    if name == "float4_e2m1fn":
        return np.arange(16, dtype=np.uint8).view(dtype)
    if dtype.itemsize <= 2:
        return np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
    body = np.random.default_rng(0).integers(0, 256, 64 * dtype.itemsize, dtype=np.uint8).view(dtype)
    if dtype.kind in "fc":
        part = np.dtype(f"f{dtype.itemsize // (2 if dtype.kind == 'c' else 1)}")
        awkward = [0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(part).tiny / 2, np.finfo(part).max]
        body = np.concatenate([np.array(awkward * 2, part).view(dtype), nan_payloads(part).view(dtype), body])
    return body


def nan_payloads(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Quiet and signalling NaNs of both signs, each with a payload of its own."""
    if dtype.itemsize == 4:
        return np.array([0x7FC00001, 0x7F800001, 0xFFC0BEEF, 0xFF80BEEF], np.uint32).view(dtype)
    payloads = [0x7FF8000000000001, 0x7FF0000000000001, 0xFFF8DEADBEEF0001, 0xFFF0DEADBEEF0001]
    return np.array(payloads, np.uint64).view(dtype)


def bits(value: Any) -> Any:
    """Something that is equal for equal bits, and for nothing else."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return ("key", str(value.dtype), value.shape, np.asarray(jax.random.key_data(value)).tobytes())
    if isinstance(value, jax.Array):
        return ("array", str(value.dtype), value.shape, np.asarray(value).tobytes())
    if isinstance(value, np.ndarray | np.generic):
        return (type(value).__name__, value.dtype.name, value.shape, value.tobytes())
    if isinstance(value, float | complex):
        return (type(value), np.array(value).tobytes())
    return (type(value), value)


def same(got: Any, wanted: Any) -> None:
    """The trees have the same structure and the same bits."""
    got_leaves, got_tree = jax.tree.flatten(got)
    wanted_leaves, wanted_tree = jax.tree.flatten(wanted)
    assert got_tree == wanted_tree
    for (path, _), one, other in zip(jax.tree.leaves_with_path(wanted), got_leaves, wanted_leaves, strict=True):
        assert bits(one) == bits(other), jax.tree_util.keystr(path)


@pytest.fixture
def agent(root: Path) -> Iterator[oc.Agent]:
    with oc.Agent(root, options=oc.Options(async_save=False, on_save_failure="raise")) as made:
        yield made


def came_back(agent: oc.Agent, state: Any, like: Any = None, **arguments: Any) -> Any:
    """`state` saved, and restored into `like` (itself by default)."""
    step = (agent.latest_step() or 0) + 1
    assert agent.save(step, state)
    restored = agent.restore(state if like is None else like, **arguments)
    assert restored is not None and restored.step == step
    return restored.state


# Every kind of leaf.


def test_every_dtype_of_jax_and_every_bit_pattern_comes_back(agent: oc.Agent) -> None:
    state = {name: jnp.asarray(every_pattern(name)) for name in DTYPES}
    assert [str(array.dtype) for array in state.values()] == DTYPES
    same(came_back(agent, state), state)


def test_the_list_of_dtypes_is_all_that_jax_has() -> None:
    known = {scalar.dtype.name for scalar in vars(jnp).values() if isinstance(scalar, type(jnp.float32))}
    no_arrays_of = {"float6_e2m3fn", "float6_e3m2fn"}  # names without arrays on any platform that we can try
    assert known - no_arrays_of == {*DTYPES, *X64_DTYPES, *REJECTED_DTYPES}


def test_64_bit_dtypes_come_back_under_x64(agent: oc.Agent) -> None:
    with jax.enable_x64(True):
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


# What cannot be stored is rejected before anything is written.


class Opaque:
    pass


def donated() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "an object": (Opaque(), "is neither an array nor a plain value"),
    "a set": ({1, 2}, "builtins.set is neither"),
    "numpy objects": (np.array([None, 1]), "numpy dtype object cannot be stored"),
    "numpy text": (np.array(["a"]), "cannot be stored"),
    "numpy dates": (np.array(["2026-01-01"], "datetime64[D]"), "cannot be stored"),
    "numpy rows": (np.zeros(2, [("a", "i4")]), "cannot be stored"),
    "long double": (np.zeros(2, np.longdouble), "cannot be stored"),
    "a donated array": (donated(), "donated or deleted; save the state that the step returned"),
    "one bit": (jnp.zeros(2, jnp.int1), "dtype int1 cannot be stored"),
    "an unsigned bit": (np.zeros(2, ml_dtypes.uint1), "numpy dtype uint1 cannot be stored"),
    "a shape": (jax.ShapeDtypeStruct((2,), jnp.float32), "is neither"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_cannot_be_stored_is_rejected_by_path_before_anything_is_written(
    agent: oc.Agent, root: Path, what: str
) -> None:
    value, said = UNSUPPORTED[what]
    before = snapshot(root)
    with pytest.raises(oc.UnsupportedLeaf) as caught:
        agent.save(1, {"good": jnp.ones(2), "bad": [value]})
    assert str(caught.value).startswith("bad/0: ") and said in str(caught.value)
    assert snapshot(root) == before
    assert agent.save(2, {"good": jnp.ones(2)})  # and the agent goes on
    assert agent.all_steps() == [2]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}, "would both be stored as 'a.b'; rename one"),
        ({"a": jnp.ones(1), "a/b": jnp.ones(1)}, "a/b would be stored inside a; rename one"),
    ],
)
def test_names_that_would_collide_in_the_store_are_rejected(agent: oc.Agent, root: Path, state: Any, said: str) -> None:
    before = snapshot(root)
    with pytest.raises(oc.UnsupportedLeaf, match=said):
        agent.save(1, state)
    assert snapshot(root) == before


@pytest.mark.parametrize("name", ["with space", "ü", "a.b", "..", "a/b", "%41", "", "zarr.json", "con:", "x" * 200])
def test_awkward_names_of_leaves_are_either_rejected_or_come_back(agent: oc.Agent, root: Path, name: str) -> None:
    state = {name: jnp.arange(3), "other": {name: np.arange(2)}}
    before = snapshot(root)
    try:
        got = came_back(agent, state)
    except oc.UnsupportedLeaf:
        assert snapshot(root) == before
    else:
        same(got, state)


# Buffers that change after `save` has returned.


def slow_to_write() -> dict[str, Any]:
    """So many arrays that writing takes longer than getting to the next line."""
    rng = np.random.default_rng(1)
    return {str(index): rng.random((64, 1024), np.float32) for index in range(40)}


def test_numpy_arrays_changed_right_after_save_do_not_leak_into_the_checkpoint(root: Path) -> None:
    state = slow_to_write()
    wanted = {name: array.copy() for name, array in state.items()}
    with oc.Agent(root, options=oc.Options(on_save_failure="raise")) as agent:
        agent.save(1, state)
        for array in state.values():
            array.fill(-1)
        restored = agent.restore(wanted)
    assert restored is not None
    same(restored.state, wanted)


def test_jax_arrays_donated_right_after_save_do_not_leak_into_the_checkpoint(root: Path) -> None:
    wanted = slow_to_write()
    state = {name: jnp.asarray(array).copy() for name, array in wanted.items()}
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    jax.block_until_ready(overwrite({name: jnp.zeros_like(array) for name, array in state.items()}))  # compile first
    with oc.Agent(root, options=oc.Options(on_save_failure="raise")) as agent:
        agent.save(1, state)
        after = jax.block_until_ready(overwrite(state))
        for array in state.values():
            array.delete()
        others = [jnp.full_like(array, -2) for array in after.values()]  # take any memory that was given back
        restored = agent.restore(wanted)
    assert restored is not None
    same(restored.state, wanted)
    assert len(others) == len(wanted)


# Other shardings, numpy, parts, casts.


def test_a_state_larger_than_the_memory_budget_is_written_while_it_is_staged(tmp_path: Path) -> None:
    state = {f"w{index}": jnp.full((1 << 20,), index, jnp.uint8) for index in range(32)}
    writer = ArrayWriter(ArrayOptions(host_bytes_max=4 << 20), process=0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten(state))
    assert 0 < pending._feed.peak_bytes <= 4 << 20
    pending.wait(60)
    merge_alone(pending)
    saved = ocp.PyTreeCheckpointer().restore(tmp_path / "state")
    assert all((saved[name] == value).all() for name, value in state.items())


def test_a_write_that_fails_while_the_rest_is_staged_fails_the_save(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    writer = ArrayWriter(ArrayOptions(host_bytes_max=1 << 20), process=0)
    with pytest.raises(oc.StorageError, match=r"create .*/state/.*: ENOTDIR"):
        writer.stage(f"file://{tmp_path}/state", flatten({f"w{n}": jnp.zeros(1 << 20, jnp.uint8) for n in range(8)}))


@pytest.mark.parametrize("when_full", ["wait", "skip"])
def test_a_save_over_the_memory_budget_waits_or_is_skipped_as_asked(root: Path, when_full: Any) -> None:
    state = {f"w{index}": jnp.full((1 << 16,), index, jnp.uint8) for index in range(8)}
    options = oc.Options(async_save=False, host_bytes_max=1 << 17, when_full=when_full)
    with oc.Agent(root, options=options) as agent:
        agent.save(1, state)
        assert agent.all_steps() == ([1] if when_full == "wait" else [])
        assert agent.failures == (0 if when_full == "wait" else 1)


def test_compressed_chunks_come_back_smaller_on_disk_and_damage_in_them_is_noticed(root: Path) -> None:
    state = {"w": jnp.arange(1 << 18).reshape(512, 512) // 7, "n": np.zeros(5), "step": 3}
    with oc.Agent(root, options=oc.Options(compression=True)) as agent:
        agent.save(1, state)
        restored = agent.restore(state)
    assert restored is not None
    assert (restored.state["w"] == state["w"]).all() and restored.state["step"] == 3
    file = max(root.glob("steps/*/*/state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    assert file.stat().st_size < state["w"].nbytes // 3
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    with pytest.raises(oc.Damaged, match="w: "):
        oc.open_run(root).restore(state, step=1)


def test_any_sharding_can_be_restored_onto_any_other(agent: oc.Agent, mesh8: jax.sharding.Mesh) -> None:
    value = jnp.arange(8 * 16, dtype=jnp.float32).reshape(8, 16)
    key = jax.random.split(jax.random.key(1), 8)
    swapped = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[2:6])
    specs = [
        NamedSharding(mesh8, PartitionSpec("data", "model")),
        NamedSharding(mesh8, PartitionSpec(("data", "model"))),
        NamedSharding(mesh8, PartitionSpec(None, "data")),
        NamedSharding(mesh8, PartitionSpec()),
        NamedSharding(swapped, PartitionSpec("y", "x")),
        jax.sharding.SingleDeviceSharding(jax.devices()[5]),
    ]
    for saved in specs:
        rows = saved if saved != specs[2] else specs[3]  # a one-dimensional array has no second axis to split
        rows = specs[0].update(spec=PartitionSpec("data")) if isinstance(saved, NamedSharding) else rows
        state = {"w": jax.device_put(value, saved), "key": jax.device_put(key, rows)}
        step = (agent.latest_step() or 0) + 1
        agent.save(step, state)
        for wanted in specs:
            like = {
                "w": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=wanted),
                "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rows),
            }
            restored = agent.restore(like, step=step)
            assert restored is not None
            assert restored.state["w"].sharding == wanted
            same(restored.state, {"w": value, "key": key})


def test_a_target_of_numpy_brings_jax_arrays_back_as_numpy_and_the_other_way_round(agent: oc.Agent) -> None:
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    same(came_back(agent, {"w": jnp.asarray(value)}, like={"w": np.zeros_like(value)}), {"w": value})
    same(came_back(agent, {"w": value}, like={"w": jnp.zeros((2, 3))}), {"w": jnp.asarray(value)})


def test_without_a_target_everything_comes_back_as_numpy_in_nested_dicts(agent: oc.Agent, root: Path) -> None:
    agent.save(1, {"a": [jnp.ones(2), {"b": 3}], "key": jax.random.key(1), "none": None})
    state = oc.open_run(root).restore().state
    assert state["a"]["1"] == {"b": 3} and state["none"] is None
    assert bits(state["a"]["0"]) == bits(np.ones(2, np.float32))
    assert bits(state["key"]) == bits(np.asarray(jax.random.key_data(jax.random.key(1))))


def test_partial_reads_the_subtree_that_is_asked_for(agent: oc.Agent) -> None:
    state = {"params": {"w": jnp.ones(2), "b": jnp.zeros(2)}, "opt": [jnp.ones(5), 3]}
    same(came_back(agent, state, like={"params": {"w": jnp.zeros(2)}}, partial=True), {"params": {"w": jnp.ones(2)}})


def test_cast_converts_as_astype_does(agent: oc.Agent) -> None:
    value = jnp.linspace(-3, 3, 7)
    like = {"w": jax.ShapeDtypeStruct((7,), jnp.bfloat16)}
    same(came_back(agent, {"w": value}, like=like, cast=True), {"w": value.astype(jnp.bfloat16)})


def test_a_target_that_does_not_fit_is_rejected_before_any_array_is_read(agent: oc.Agent, root: Path) -> None:
    agent.save(1, {"w": jnp.ones((64, 64))})
    for file in root.glob("steps/*/*/state/**/d/*"):
        file.write_bytes(bytes(len(file.read_bytes())))  # of the same size: whoever reads it meets damage
    with pytest.raises(oc.Mismatch, match=r"w: checkpoint f32\[64,64\], target f32\[32\]"):
        agent.restore({"w": jnp.ones(32)})
    with pytest.raises(oc.Damaged):
        agent.restore({"w": jnp.ones((64, 64))}, step=1)


# Others read what we write.


def test_plain_orbax_loads_a_step_with_equal_values(agent: oc.Agent, root: Path, mesh8: jax.sharding.Mesh) -> None:
    sharding = NamedSharding(mesh8, PartitionSpec("data", "model"))
    state = {
        "w": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding),
        "half": jnp.asarray(every_pattern("bfloat16")),
        "nested": [np.arange(3), {"count": 7, "rate": 0.25, "name": "adam"}],
        "none": None,
    }
    agent.save(1, state)
    (directory,) = root.glob("steps/*/*/state")
    arguments = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray) if hasattr(leaf, "shape") else ocp.RestoreArgs(), state
    )
    plain = ocp.PyTreeCheckpointer().restore(str(directory), restore_args=arguments)
    for name in ("w", "half"):
        assert bits(np.asarray(plain[name])) == bits(np.asarray(state[name]))
    assert bits(np.asarray(plain["nested"][0])) == bits(np.arange(3))
    assert plain["nested"][1] == {"count": 7, "rate": 0.25, "name": "adam"}
    onto_mesh = ocp.args.PyTreeRestore(
        item={"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)},
        restore_args={"w": ocp.ArrayRestoreArgs(sharding=sharding)},
        partial_restore=True,
    )
    assert bits(ocp.PyTreeCheckpointer().restore(str(directory), args=onto_mesh)["w"]) == bits(state["w"])


# What a receipt says.


def test_the_boxes_of_a_receipt_are_each_shard_once_whatever_is_replicated(
    tmp_path: Path, mesh8: jax.sharding.Mesh
) -> None:
    value = jnp.arange(8.0 * 4).reshape(8, 4)
    state = {
        "split": jax.device_put(value, NamedSharding(mesh8, PartitionSpec("data", "model"))),
        "replicated over model": jax.device_put(value, NamedSharding(mesh8, PartitionSpec("data"))),
        "replicated": jax.device_put(value, NamedSharding(mesh8, PartitionSpec())),
        "numpy": np.zeros((2, 2)),
        "python": 3,
    }
    writer = ArrayWriter(ArrayOptions(), 0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten(state))
    pending.wait(60)
    counts = {name: len(boxes) for name, boxes in pending.boxes.items()}
    assert counts == {"split": 8, "replicated over model": 4, "replicated": 1, "numpy": 1}
    assert {(box.start, box.stop) for box in pending.boxes["replicated over model"]} == {
        ((row, 0), (row + 2, 4)) for row in (0, 2, 4, 6)
    }


def test_waiting_for_a_write_is_bounded(tmp_path: Path) -> None:
    writer = ArrayWriter(ArrayOptions(), process=0)
    pending = writer.stage(f"file://{tmp_path}/state", flatten({"w": jnp.zeros((256, 1 << 20), jnp.uint8)}))
    with pytest.raises(oc.WaitTimeout, match=r"did not finish within 0\.001 s"):
        pending.wait(0.001)


def test_a_write_that_nobody_wants_any_more_is_given_up_and_the_next_one_is_whole(tmp_path: Path) -> None:
    writer = ArrayWriter(ArrayOptions(), process=0)
    flat = flatten({"w": jnp.zeros((64, 1 << 20), jnp.uint8)})
    with pytest.raises(WriteStopped):
        writer.stage(f"file://{tmp_path}/given-up", flat).wait(30, given_up=lambda: True)
    pending = writer.stage(f"file://{tmp_path}/whole", flat)
    pending.wait(30)
    merge_alone(pending)
    saved = ocp.PyTreeCheckpointer().restore(tmp_path / "whole")
    assert saved["w"].shape == (64, 1 << 20)

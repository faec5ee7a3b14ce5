"""What is restored onto CPU devices is XLA's own memory: as donatable as any array, of nobody else, and bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import orchestrator as oc
from orchestrator.arrays.reading import owned_memory
from tests.support.leaf_values import DTYPES, every_pattern, same
from tests.support.runs import now

MIB = 1 << 20


def over(count: int, spec: PartitionSpec, **more: Any) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("data",)), spec, **more)


ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()
SHARDINGS = {
    "rows": over(2, ROWS),
    "replicated": over(3, WHOLE),
    "rows, each twice": NamedSharding(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model")), ROWS),
    "one device": SingleDeviceSharding(jax.devices()[5]),
    "offloaded": over(2, ROWS, memory_kind="pinned_host"),
}


STEPPED = ("bool", "int4", "bfloat16", "complex64", "keys", "alike 0", "alike 39")


def addresses(state: Any) -> list[int]:
    """Of each device's part of each array that has elements: those without have any address."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    plain = [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in leaves]
    return [shard.data.unsafe_buffer_pointer() for leaf in plain for shard in leaf.addressable_shards]


@jax.jit
def turned(state: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[::-1] if leaf.ndim else leaf, state)


step = jax.jit(turned.__wrapped__, donate_argnums=0)


@pytest.fixture(params=["read into", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways, for arrays of any size."""
    monkeypatch.setattr(owned_memory, "ARRAY_BYTES", 1 if request.param == "read into" else 1 << 60)
    monkeypatch.setattr(owned_memory, "TOTAL_BYTES", 1)
    return str(request.param)


def programs() -> int:
    """How often a program has been asked for that allocates arrays to read into."""
    known = owned_memory._program.cache_info()
    return known.hits + known.misses


@pytest.mark.parametrize("placed", SHARDINGS)
def test_restored_arrays_are_equal_and_a_donating_step_reuses_their_memory(root: Path, way: str, placed: str) -> None:
    sharding = SHARDINGS[placed]
    plain = {name: np.resize(every_pattern(name), (8, 48)) for name in DTYPES}
    state = {name: jax.device_put(value, sharding) for name, value in plain.items()}
    state["keys"] = jax.device_put(jax.random.split(jax.random.key(3), 8), sharding)
    state |= {f"alike {at}": jax.device_put(np.full((8, 48), at, np.float32), sharding) for at in range(40)}
    state["empty"] = jax.device_put(np.zeros((0, 3), np.float32), over(2, WHOLE))
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state)
        before = programs()
        # The third is for the step: JAX 0.11.2 keeps the memory of a sharded array that numpy has looked at.
        first, second, third = agent.restore(state), agent.restore(state), agent.restore(state)
    assert (programs() > before) == (way == "read into" and placed != "offloaded")
    assert first is not None and second is not None and third is not None
    for restored in (first.state, second.state):
        same(restored, state)
        assert {name: leaf.sharding for name, leaf in restored.items()} == {
            n: leaf.sharding for n, leaf in state.items()
        }
    for name, value in plain.items():
        for shard in first.state[name].addressable_shards:  # every replica of each
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), name
    every = addresses([first.state, second.state, third.state])
    assert len(set(every)) == len(every)
    # Programs compute on no offloaded arrays; reversing those of two bits corrupts the heap, with jaxlib 0.10.2 alone.
    stepped = {} if placed == "offloaded" else {name: third.state[name] for name in STEPPED}
    held, expected = addresses(stepped), turned({name: state[name] for name in stepped})
    after = step(stepped)
    assert set(addresses(after)) == set(held), "the step needed no memory of its own"
    same(after, expected)
    same(second.state, state)


def test_a_large_state_is_read_into_what_the_first_step_then_reuses(root: Path) -> None:
    """With the real thresholds; arrays of one form, of several, and small ones."""
    rng = np.random.default_rng(0)
    shapes = [(1024, 2048)] * 3 + [(2048, 1024)] + [(16, 4)] * 3
    state: dict[str, Any] = {
        str(at): jax.device_put(rng.random(shape, np.float32), over(2, ROWS)) for at, shape in enumerate(shapes)
    }
    state["alone"] = jax.device_put(rng.integers(0, 1 << 16, (5 * MIB,), np.uint16), over(2, WHOLE))
    assert sum(leaf.nbytes for leaf in state.values()) > owned_memory.TOTAL_BYTES
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}
    like["3"] = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16, sharding=over(2, WHOLE))
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state)
        before = programs()
        restored, again = agent.restore(like, cast=True), agent.restore(like, cast=True)
    assert restored is not None and again is not None and programs() > before
    state["3"] = state["3"].astype(jnp.bfloat16)
    same(restored.state, state)
    held = addresses(again.state)  # which numpy has not looked at, as above
    assert set(addresses(step(again.state))) == set(held)


def test_a_damaged_step_is_stepped_over_and_the_one_before_is_read(root: Path, way: str) -> None:
    state = {"w": jax.device_put(np.arange(1 << 18, dtype=np.float32), over(2, ROWS))}
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state) and agent.save(2, jax.tree.map(jnp.negative, state))
        (file,) = [
            path for path in root.glob("steps/00000002/*/state/ocdbt.process_0/d/*") if path.stat().st_size > MIB
        ]
        with file.open("r+b") as opened:
            opened.seek(MIB // 2)
            opened.write(b"\xff\x00\xff\x00")
        restored = agent.restore(state)
    assert restored is not None and restored.step == 1
    same(restored.state, state)


def test_what_is_allocated_is_new_each_time_and_written_to_by_nobody_else() -> None:
    devices = tuple(jax.devices()[:2])
    forms = [((256, 64), np.dtype(np.float32)), ((3, 5), np.dtype(jnp.bfloat16)), ((256, 64), np.dtype(np.float32))]
    kept = [owned_memory.allocate(devices, forms) for _ in range(3)]
    parts = [part for found in kept for arrays in found or () for part in arrays]
    assert len(parts) == 18
    for number, part in enumerate(parts):
        owned_memory.memory(part)[:] = number
    assert [part.devices() for part in parts] == [{devices[number % 2]} for number in range(18)]
    for number, part in enumerate(parts):
        assert np.asarray(part).tobytes() == bytes([number]) * (math.prod(part.shape) * part.dtype.itemsize)


def test_where_jax_has_no_such_program_everything_is_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_memory, "_callbacks", None)
    monkeypatch.setattr(owned_memory, "TOTAL_BYTES", 1)
    monkeypatch.setattr(owned_memory, "ARRAY_BYTES", 1)
    state = {"w": jax.device_put(np.arange(64, dtype=np.float32), over(2, ROWS))}
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state)
        restored = agent.restore(state)
    assert restored is not None
    held = addresses(restored.state)
    assert addresses(step(restored.state)) == held

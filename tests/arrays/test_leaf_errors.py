"""Every error about one leaf names it; and what of a leaf does not come back is what the guide says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import flatten
from tests.support.runs import now


def scalar(dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((), dtype)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(
    ("saved", "target", "says"),
    [
        (2**31, scalar(jnp.int32), "int 2147483648, target i32"),
        (-(2**31) - 1, scalar(jnp.int32), "int -2147483649, target i32"),
        (256, scalar(jnp.uint8), "int 256, target u8"),
        (-1, scalar(jnp.uint8), "int -1, target u8"),
        (9, scalar(jnp.int4), "int 9, target i4"),
        (10**30, scalar(jnp.int32), "cannot hold it; ask for a wider dtype"),
        (300, np.int8(0), "int 300, target i8"),
        (7, scalar(jnp.float32), "int, target f32"),
        (True, scalar(jnp.float32), "bool, target f32"),
        (1, scalar(jnp.bool_), "int, target bool"),
        (1.5, scalar(jnp.int32), "float, target i32"),
        (1j, scalar(jnp.float32), "complex, target f32"),
        ("text", scalar(jnp.int32), "str, target i32"),
        (jnp.float32(7), 0, "f32.*, target int"),
        (jnp.float32(np.nan), 0, "f32.*, target int"),
        (jnp.ones(2), 0.0, r"f32\[2\], target float"),
        (jax.random.key(0, impl="rbg"), jax.eval_shape(lambda: jax.random.key(0)), "PRNG keys cannot be cast"),
        (jax.random.key(0), jax.ShapeDtypeStruct((2,), jnp.uint32), "key<fry>.*, target u32"),
        (jnp.zeros(2, jnp.uint32), jax.eval_shape(lambda: jax.random.key(0)), "u32.*, target key<fry>"),
    ],
    ids=str,
)
def test_a_target_that_cannot_hold_what_was_saved_is_a_mismatch_naming_the_leaf(
    root: Path, saved: Any, target: Any, says: str, cast: bool
) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"model": {"w": saved}})
        with pytest.raises(oc.Mismatch, match=rf"model/w: checkpoint .*{says}"):
            agent.restore({"model": {"w": target}}, cast=cast)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("attest", [False, True])
@pytest.mark.parametrize("shape", [(3,), (1 << 20,)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leaf_that_cannot_be_taken_from_its_devices_is_named(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, attest: bool, planned: bool
) -> None:
    tree = {"model": {"w": jnp.ones(shape, dtype), "b": jnp.ones(2)}}
    writer, flat = ArrayWriter(ArrayOptions(), 0), flatten(tree)
    if planned:
        writer.stage(f"file://{tmp_path}", flat, attest).stop()
    tree["model"]["w"].delete()  # by another thread, say, once the tree was looked at
    with pytest.raises(oc.OrchestratorError, match=r"^model/w: \w+Error: "):
        writer.stage(f"file://{tmp_path}", flat, attest)


def test_weak_types_come_back_strong_and_empty_containers_are_the_targets_own(root: Path) -> None:
    params = {"w": jnp.ones(3)}
    state = {"weak": jax.jit(lambda: 1.0)(), "opt": optax.sgd(0.1).init(params), "slots": optax.adam(0.1).init(params)}
    assert state["weak"].weak_type
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, state)
        restored = agent.restore(state)
        plain = oc.open_run(root).restore()
    assert restored is not None
    assert not restored.state["weak"].weak_type and restored.state["weak"].dtype == jnp.float32
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert isinstance(restored.state["slots"][1], optax.EmptyState)
    assert plain.state["slots"]["1"] == () and not isinstance(plain.state["slots"]["1"], optax.EmptyState)

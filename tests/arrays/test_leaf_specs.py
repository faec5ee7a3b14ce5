"""What cannot be stored is rejected before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import orchestrator as oc
from tests.support.leaf_values import came_back, same
from tests.support.snapshots import snapshot


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
    "a shape": (jax.ShapeDtypeStruct((2,), jnp.float32), "is neither"),
}
if hasattr(ml_dtypes, "uint1"):  # before 0.5.1 it has none
    UNSUPPORTED["an unsigned bit"] = (np.zeros(2, ml_dtypes.uint1), "numpy dtype uint1 cannot be stored")
if hasattr(jnp, "int1"):  # JAX before 0.9 has no arrays of one bit
    UNSUPPORTED["one bit"] = (jnp.zeros(2, jnp.int1), "dtype int1 cannot be stored")


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

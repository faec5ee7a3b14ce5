"""What is to be read for a target, found once for a form; whatever differs is matched by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from orchestrator.arrays import flatten, jax_internals, match_tree
from orchestrator.errors import Mismatch
from orchestrator.rules.records import TreeSpec


class Empty(NamedTuple):
    """As optax has one."""


def state() -> dict[str, Any]:
    return {"w": jnp.ones((8, 4)), "b": jnp.zeros(4), "step": 3, "opt": (Empty(), None), "own": {}, "n": np.ones(2)}


SAVED = flatten(state()).spec
MATRIX = TreeSpec(leaves=flatten({"w": jnp.ones((8, 4)), "step": 3}).spec.leaves)


def split(axis: str | None = "d") -> NamedSharding:
    return NamedSharding(jax.make_mesh((2,), ("d",)), PartitionSpec(axis))


def abstract(dtype: Any = jnp.float32, sharding: Any = None) -> dict[str, Any]:
    return {"w": jax.ShapeDtypeStruct((8, 4), dtype, sharding=sharding), "step": 0}


Case = Callable[[], tuple[Any, dict[str, bool]]]
AS_FIRST: Case = lambda: (abstract(sharding=split()), {})  # noqa: E731
OTHERS: dict[str, Case] = {
    "other sharding": lambda: (abstract(sharding=split(None)), {}),
    "no sharding": lambda: (abstract(), {}),
    "cast": lambda: (abstract(jnp.bfloat16, split()), {"cast": True}),
    "an array instead": lambda: ({"w": jax.device_put(jnp.ones((8, 4)), split()), "step": 0}, {}),
    "numpy instead": lambda: ({"w": np.ones((8, 4), np.float32), "step": 0}, {}),
    "a number that is an array": lambda: (abstract(sharding=split()) | {"step": jnp.zeros((), jnp.int32)}, {}),
    "less": lambda: ({"w": abstract(sharding=split())["w"]}, {"partial": True}),
    "none": lambda: (None, {}),
}


def matched(case: Case, saved: TreeSpec = MATRIX) -> Any:
    like, how = case()
    return match_tree(saved, like, **{"partial": False, "cast": False, **how}, where="")


def read_of(found: Any) -> list[Any]:
    return [(request.leaf.path, request.sharding, request.dtype) for request in found.requests]


def test_the_same_form_is_matched_once() -> None:
    first = matched(AS_FIRST)
    assert matched(AS_FIRST) is first
    assert read_of(first) == [(("step",), None, None), (("w",), split(), None)]


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_differs_is_matched_by_itself(other: str) -> None:
    first, found = matched(AS_FIRST), None
    for _ in range(2):  # found first, and kept
        found = matched(OTHERS[other])
        assert found is not first
    fresh = matched(OTHERS[other], TreeSpec(leaves=tuple(list(MATRIX.leaves))))  # equal, and another object
    assert found is not fresh and read_of(found) == read_of(fresh)
    values = [3, np.ones((8, 4), np.float32)][-len(read_of(found)) :]
    built, expected = found.build(values), fresh.build(values)
    assert jax.tree.structure(built) == jax.tree.structure(expected)
    assert [type(leaf) for leaf in jax.tree.leaves(built)] == [type(leaf) for leaf in jax.tree.leaves(expected)]


def test_another_saved_tree_of_equal_names_is_matched_by_itself() -> None:
    matched(AS_FIRST)
    other = flatten({"w": jnp.ones((8, 2)), "step": 3}).spec
    for _ in range(2):
        with pytest.raises(Mismatch, match="w: checkpoint"):
            matched(AS_FIRST, other)


def test_a_target_of_64_bits_is_rejected_once_they_are_off_however_often_it_was_fine() -> None:
    case: Case = lambda: ({"w": jax.ShapeDtypeStruct((4,), np.float64)}, {})  # noqa: E731
    with jax_internals.enable_x64():
        saved = flatten({"w": jnp.ones(4)}).spec
        assert matched(case, saved) is matched(case, saved)
    with pytest.raises(Mismatch, match="enable x64"):
        matched(case, saved)


def test_empty_containers_are_each_targets_own() -> None:
    first, second = state(), state()
    values = [first[name] for name in ("b", "n")]
    for like in (first, second):
        found = match_tree(SAVED, like, partial=False, cast=False, where="")
        names = [request.leaf.name for request in found.requests]
        built = found.build([dict(zip("bn", values, strict=True)).get(name, 0) for name in names])
        assert built["own"] is like["own"] and isinstance(built["opt"][0], Empty) and built["opt"][1] is None
        assert built["b"] is values[0] and built["step"] == 0

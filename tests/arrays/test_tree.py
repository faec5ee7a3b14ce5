"""Saves of one form share a plan: whatever differs between them must be seen, and be stored as it is now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.arrays.tree import flatten
from orchestrator.arrays.writing.write_plan import plan_of
from tests.support.runs import now


def base(step: int) -> dict[str, Any]:
    return {
        "w": jnp.full((4, 2), float(step)),
        "empty": optax.EmptyState(),
        "numbers": [step, step / 3, step % 2 == 0, f"step {step}", bytes([step]), complex(step, 1)],
        "numpy": np.full(3, step),
        "key": jax.random.key(step),
    }


def test_a_later_save_has_the_same_form_and_its_own_values() -> None:
    first, second = flatten(base(1)), flatten(base(2))
    assert second.form is first.form
    assert plan_of(second, 0, False) is plan_of(first, 0, False)
    assert [leaf.value for leaf in second.spec.leaves if leaf.kind == "str"] == ["step 2"]
    fresh = flatten({**base(2), "other": 0})
    assert tuple(leaf for leaf in fresh.spec.leaves if leaf.path != ("other",)) == second.spec.leaves


def test_values_of_all_kinds_come_back_from_a_second_save(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step in (1, 2, 3):
            agent.save(step, base(step))
        for step in (3, 2, 1):
            restored = agent.restore(base(0), step=step)
            assert restored is not None
            wanted = base(step)
            assert restored.state["numbers"] == wanted["numbers"]
            for name in ("w", "numpy"):
                assert np.array_equal(restored.state[name], wanted[name])
            assert (jax.random.key_data(restored.state["key"]) == jax.random.key_data(wanted["key"])).all()


@pytest.mark.parametrize(
    "changed",
    [
        {"w": jnp.zeros((4, 3))},
        {"w": jnp.zeros((4, 2), jnp.bfloat16)},
        {"w": np.zeros((4, 2), np.float32)},
        {"numpy": np.zeros(4)},
        {"empty": ()},
        {"empty": None},
        {"empty": {}},
        {"key": jax.random.key(1, impl="rbg")},
        {"numbers": [1, 0.5, True, "x", b"", 1]},
        {"numbers": [2**63, 0.5, True, "x", b"", 1j]},  # not a number that Orbax's files can hold
        {"numbers": [True, 0.5, True, "x", b"", 1j]},
        {"more": 1},
    ],
    ids=str,
)
def test_anything_stored_in_another_way_is_another_form(changed: dict[str, Any]) -> None:
    before = flatten(base(1))
    after = flatten({**base(1), **changed})
    assert after.form is not before.form
    assert flatten(base(2)).form is before.form  # and the first one is still known


def test_another_sharding_is_another_form(mesh8: jax.sharding.Mesh) -> None:
    value = jnp.zeros((8, 8))
    # With automatic axes the array's own type does not tell.
    auto = jax.sharding.Mesh(mesh8.devices, mesh8.axis_names, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = [jax.device_put(value, NamedSharding(auto, PartitionSpec(*spec))) for spec in (("data",), ("model",), ())]
    assert len({flatten({"w": array}).form for array in split}) == 3


@pytest.mark.parametrize("other", [np.zeros((4, 2), np.float32), 3.0, jnp.zeros((2, 4)), jnp.zeros((4, 2), jnp.int32)])
def test_a_tree_of_nothing_but_arrays_is_told_from_one_that_is_not(other: Any) -> None:
    first = flatten({"a": jnp.zeros((4, 2)), "b": jnp.ones(3)})
    again, changed = flatten({"a": jnp.ones((4, 2)), "b": jnp.zeros(3)}), flatten({"a": other, "b": jnp.ones(3)})
    assert again.form is first.form and again.spec == first.spec
    assert changed.form is not first.form


def test_a_donated_array_is_rejected_by_name_also_in_a_known_form() -> None:
    flatten({"a": {"b": jnp.zeros(3)}})
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(oc.UnsupportedLeaf, match="a/b: the array was donated or deleted"):
        flatten({"a": {"b": gone}})
    mixed = {"a": None, "b": 1, "c": {}, "d": jnp.zeros(3)}
    flatten(mixed)
    with pytest.raises(oc.UnsupportedLeaf, match="d: the array was donated or deleted"):
        flatten({**mixed, "d": gone})


class Table(dict[str, Any]):
    """No container to JAX: a leaf, also when it is empty."""


def test_empty_containers_keep_their_places_in_a_known_form() -> None:
    def tree(number: float) -> Any:
        return [None, jnp.full(2, number), {}, optax.EmptyState(), Table(), number, (), {"k": None, "v": number}, []]

    first, again = flatten(tree(1.0)), flatten(tree(2.0))
    assert again.form is first.form
    assert [type(value) for value in again.values] == [type(value) for value in first.values]
    assert [leaf.kind for leaf in first.spec.leaves] == [
        *("none", "array", "empty", "empty", "empty", "float", "empty", "none", "float", "empty"),
    ]
    assert [value for value in again.values if isinstance(value, float)] == [2.0, 2.0]
    table: Any = tree(1.0)
    table[4] = {}
    assert flatten(table).form is not first.form, "another container there"

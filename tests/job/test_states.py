"""States as people have them: what cannot be stored is rejected by name before anything is written, and whatever is
stored comes back as it was."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orchestrator as oc
from tests.support.runs import now
from tests.support.snapshots import snapshot

W = jnp.arange(4.0)


class Phase(enum.IntEnum):
    WARM_UP = 5


class Count(int):
    pass


class Name(enum.StrEnum):
    ADAM = "adam"


def deep(levels: int) -> Any:
    tree: Any = W
    for _ in range(levels):
        tree = {"d": tree}
    return tree


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"w": np.ma.array([1.0, 2.0], mask=[0, 1])}, "w: a masked array would lose its mask"),
        (lambda: {"a": {"w": np.array([1, "a"], object)}}, "a/w: numpy dtype object cannot be stored"),
        (lambda: {"w": np.array(["a"])}, "w: numpy dtype <U1 cannot be stored"),
        (lambda: {"w": np.zeros(3, [("a", "f4"), ("b", "i4")])}, "w: numpy dtype [('a', '<f4'), ('b', '<i4')] cannot"),
        (lambda: {"w": np.zeros(3, jax.dtypes.float0)}, "w: numpy dtype [('float0', 'V')] cannot be stored"),
        (lambda: {"w": W, "s": "\ud800"}, "s: 'utf-8' codec can't encode character"),
        (lambda: {"a\ud800": W}, "'a\\ud800': surrogates not allowed; rename it"),
        (lambda: {"w": W, "n": 10**5000}, "n: Exceeds the limit (4300 digits)"),
        (lambda: {1: W, "1": W}, "the state is no pytree: Comparator raised exception while sorting pytree dictionary"),
        (lambda: {"a.b": W, "a": {"b": W}}, "a.b and a/b would both be stored as 'a.b'; rename one"),
        # Too deep for some Pythons: what JAX of others takes, is a path that is too long.
        (
            lambda: deep(2000),
            ("the state (dict) contains itself, or is nested too deeply", "('d', 'd', 'd')...: a path"),
        ),
        (lambda: {"w": W, "f": print}, "f: builtins.builtin_function_or_method is neither an array nor a plain value"),
        (
            lambda: {"w": jax.ShapeDtypeStruct((3,), jnp.float32)},
            f"w: {jax.ShapeDtypeStruct.__module__}.ShapeDtypeStruct is neither an array",
        ),
        (lambda: {}, "the state has no leaves"),
        (lambda: None, "the state has no leaves"),
    ],
)
def test_what_cannot_be_stored_is_rejected_by_name_and_changes_nothing(
    root: Path, make: Callable[[], Any], said: str | tuple[str, ...]
) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": W})
        before = snapshot(root)
        with pytest.raises(oc.UnsupportedLeaf) as caught:
            agent.save(2, make())
        assert str(caught.value).startswith(said)
        assert snapshot(root) == before
        assert agent.save(2, {"w": W}), "the step can still be saved"


def test_a_save_or_restore_that_is_traced_says_so(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": W})  # also where a save has gone before

        def body(w: jax.Array, x: Any) -> Any:
            agent.save(2, {"w": w})
            return w, x

        for act in (
            lambda: jax.jit(lambda w: agent.save(2, {"w": w}))(W),
            lambda: jax.lax.scan(body, W, None, length=2),
            lambda: jax.jit(lambda w: agent.restore({"w": w}))(W),
        ):
            with pytest.raises(oc.UnsupportedLeaf, match=r"w: .*float32\[4\].* is being traced; .* outside of jax.jit"):
                act()
        assert agent.all_steps() == [1]


@pytest.mark.parametrize(
    "leaf",
    [Phase.WARM_UP, Count(3), Name.ADAM, -0.0, "", b"", True, 2**63, -(2**70), complex(0, -1)],
    ids=repr,
)
def test_plain_values_of_any_kind_come_back_equal_from_a_first_and_a_second_save(root: Path, leaf: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step in (1, 2):  # an IntEnum made the first save ask 2**64 numbers whether they were it
            agent.save(step, {"leaf": leaf, "w": W})
            restored = agent.restore({"leaf": leaf, "w": W}, step=step)
            assert restored is not None and restored.state["leaf"] == leaf


@pytest.mark.parametrize(
    "array",
    [
        np.arange(3000, dtype=">f4"),
        np.array(3.0, ">f8"),
        np.arange(100)[::3].reshape(2, 17).T,
        np.broadcast_to(np.float32(3), (4, 4)),
        np.zeros((3, 0)),
    ],
    ids=["big-endian", "big-endian scalar", "strided", "broadcast", "no elements"],
)
def test_numpy_arrays_of_any_layout_come_back_equal_also_where_the_form_is_known(root: Path, array: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"a": np.array(array, array.dtype.newbyteorder("="), order="C")})
        agent.save(2, {"a": array})
        for step in (1, 2):
            restored = agent.restore({"a": array}, step=step)
            assert restored is not None
            assert np.array_equal(restored.state["a"], array) and restored.state["a"].dtype.isnative


def test_a_leaf_that_is_in_the_state_twice_is_stored_twice(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"a": W, "b": [W, None, (W,)]})
        restored = agent.restore({"a": W, "b": [W, None, (W,)]})
        assert restored is not None
        assert all(np.array_equal(leaf, W) for leaf in jax.tree.leaves(restored.state))

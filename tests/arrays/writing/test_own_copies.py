"""What a process compares of its own copies, save by save, and that a digest is of what process 0 stores."""

from __future__ import annotations

from typing import Any

import crc32c
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orchestrator.arrays.tree import flatten
from orchestrator.arrays.writing import own_copies
from orchestrator.arrays.writing.own_copies import EACH_SAVE_BYTES, Turns
from orchestrator.arrays.writing.write_plan import Plan, plan_of
from orchestrator.rules import holders
from orchestrator.rules.records import Held


def plan(*values: Any, chunk: tuple[int, ...] | None = None) -> tuple[Any, Plan]:
    """Of process 1, which has its own of each: in this test's JAX, all devices are process 0's, so numpy arrays."""
    flat = flatten(list(values))
    return flat, plan_of(flat, 1, False, (Held(len(values), None, chunk),))


def test_the_first_save_compares_everything_and_later_ones_what_is_next() -> None:
    third = np.broadcast_to(np.uint8(0), EACH_SAVE_BYTES // 3 + 1)
    more_than_all = np.broadcast_to(np.uint8(0), EACH_SAVE_BYTES + 1)
    _, found = plan(third, third, third, more_than_all, 7)
    turns = Turns()
    assert [number for number, _ in turns.chosen(found)] == [0, 1, 2, 3, 4]
    assert [number for number, _ in turns.chosen(found)] == [0, 1, 2, 3, 4], "until it has been compared once"
    turns.done(found)
    chosen = [[number for number, _ in turns.chosen(found)] for _ in range(5)]
    assert chosen == [[0, 1], [2], [3], [4, 0, 1], [2]]


def test_what_is_small_is_compared_each_time() -> None:
    _, found = plan(np.zeros(10), 7, "text")
    turns = Turns()
    turns.done(found)
    assert turns.chosen(found) == turns.chosen(found) == found.own != ()


@pytest.mark.parametrize(
    "value",
    [np.arange(24.0).reshape(6, 4), np.arange(6, dtype=">i2"), np.float32(2), np.array(True), np.arange(12)[::3]],
    ids=["rows", "big-endian", "scalar", "bool", "strided"],
)
@pytest.mark.parametrize("rows", [None, 2])
def test_a_digest_is_of_the_chunks_that_process_0_stores(value: Any, rows: int | None) -> None:
    shape = np.shape(value)
    chunk = (rows, *shape[1:]) if rows and shape else None
    flat, found = plan(value, chunk=chunk)
    (leaf,) = flat.spec.leaves
    native = np.array(value, np.asarray(value).dtype.newbyteorder("="), order="C")
    parts = [native[at : at + rows] for at in range(0, shape[0], rows)] if rows and shape else [native]
    stored = [f"{crc32c.crc32c(part.tobytes()):08x}" for part in parts]
    assert own_copies.take(flat, found, Turns()).result() == holders.digest_of_chunks(
        holders.cut(leaf, found.held[0]).form, stored
    )


def test_an_array_that_is_overwritten_after_it_was_taken_counts_as_it_was() -> None:
    value = np.arange(5)
    flat, found = plan(value)
    before = own_copies.take(flat, found, Turns()).result()
    taken = own_copies.take(flat, found, Turns())
    value[:] = 0
    assert taken.result() == before != own_copies.take(flat, found, Turns()).result()


def test_a_leaf_on_process_0s_devices_alone_is_nobody_elses_own() -> None:
    flat = flatten({"stage": jnp.arange(3), "mine": np.arange(3)})
    found = plan_of(flat, 1, False, (Held(2),))
    assert [flat.spec.leaves[number].name for number, _ in found.own] == ["mine"]
    digests = own_copies.take(flat, found, Turns()).result()
    assert digests[4:] == holders.not_compared() != digests[:4]
    assert jax.process_count() == 1

"""Fingerprints: the documented construction, the same for every sharding, different for everything else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from orchestrator.arrays import fingerprint, jax_internals
from orchestrator.errors import Damaged
from orchestrator.rules import fingerprints
from orchestrator.rules.records import LeafSpec, ShardFingerprint
from tests.support.builders import box, intent, leaf, receipt
from tests.support.leaf_values import DTYPES, X64_DTYPES, every_pattern

MASK = 0xFFFFFFFF


def mixed(word: int) -> int:
    word = (word ^ word >> 16) * 0x85EBCA6B & MASK
    word = (word ^ word >> 13) * 0xC2B2AE35 & MASK
    return word ^ word >> 16


def by_the_book(words: list[int], first: int = 0, large: bool = False) -> str:
    """The construction as its documentation has it, one word after another, in Python's own integers."""
    sums = [0] * 4
    for position, word in enumerate(words, first):
        low, high = position & MASK, position >> 32
        x = mixed(word + 0x9E3779B1 * low & MASK)
        if large:
            x = mixed(x + 0x85EBCA77 * high & MASK)
        y = mixed(low ^ x)
        for lane, more in enumerate((x, y, mixed(x + 0x27D4EB2F * y & MASK), mixed(y ^ 0x165667B1 * x & MASK))):
            sums[lane] = sums[lane] + more & MASK
    return "".join(f"{lane:08x}" for lane in sums)


def words_of(value: np.ndarray[Any, Any]) -> list[int]:
    narrow = {"int2": 3, "uint2": 3, "int4": 15, "uint4": 15, "float4_e2m1fn": 15}.get(value.dtype.name)
    unit = min(4, value.dtype.itemsize)
    raw = np.frombuffer(value.tobytes(), f"<u{unit}").tolist()
    return [word & narrow for word in raw] if narrow else raw


def array_leaf(value: Any) -> LeafSpec:
    return leaf("w", value.shape, dtype=value.dtype.name)


def of(value: Any) -> str:
    return fingerprint.of(array_leaf(value), value)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_bit_pattern_counts_as_documented_on_a_device_and_in_numpy(name: str) -> None:
    value = every_pattern(name)[:3000]
    wanted = by_the_book(words_of(value))
    assert of(jnp.asarray(value)) == wanted
    assert of(value) == wanted


@pytest.mark.parametrize("name", X64_DTYPES)
def test_wide_dtypes_count_as_words_with_and_without_x64(name: str) -> None:
    value = every_pattern(name)
    wanted = by_the_book(words_of(value))
    assert of(value) == wanted
    with jax_internals.enable_x64():
        assert of(jnp.asarray(value)) == wanted


def test_scalars_keys_big_endian_and_strided_arrays_have_fingerprints_too() -> None:
    assert of(jnp.float32(1.5)) == of(np.float32(1.5)) == by_the_book(words_of(np.array(1.5, np.float32)))
    keys = jax.random.split(jax.random.key(7), 6)
    spec = LeafSpec(path=("k",), kind="key", shape=(6,), dtype=str(keys.dtype), stored_shape=(6, 2))
    assert fingerprint.of(spec, keys) == of(jax.random.key_data(keys))
    big = np.arange(12, dtype=">f4").reshape(3, 4)
    assert of(big) == of(big.astype("<f4")) == of(np.asfortranarray(big))
    assert of(big[:, ::2]) == of(np.ascontiguousarray(big[:, ::2]).astype("<f4"))


SPECS = [
    PartitionSpec(),
    PartitionSpec("data"),
    PartitionSpec("model"),
    PartitionSpec(None, "model"),
    PartitionSpec("model", "data"),
    PartitionSpec("data", "model"),
    PartitionSpec(("data", "model")),
    PartitionSpec(None, ("model", "data")),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "complex64", "int4"])
def test_every_sharding_has_the_fingerprint_of_the_whole(mesh8: jax.sharding.Mesh, dtype: str) -> None:
    body = np.random.default_rng(0).integers(0, 256, 16 * 24 * 8, dtype=np.uint8)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype == "int4":
        value = (body[: 16 * 24].astype(np.int8) // 16).reshape(16, 24).astype(kind)
    else:
        value = body[: 16 * 24 * kind.itemsize].view(kind).reshape(16, 24)
    wanted = by_the_book(words_of(value))
    for spec in SPECS:
        array = jax.device_put(value, NamedSharding(mesh8, spec))
        assert of(array) == wanted, spec
        (found,) = fingerprint.start([(array_leaf(array), array)]).result().values()
        assert [part.device for part, _ in found] == [shard.device.id for shard in array.addressable_shards]
        by_replica: dict[int, list[str]] = {}
        for part, told in found:
            by_replica.setdefault(part.replica, []).append(told)
        assert {fingerprints.total(prints) for prints in by_replica.values()} == {wanted}
    assert of(jax.device_put(value, SingleDeviceSharding(jax.devices()[3]))) == wanted


@pytest.mark.parametrize("shape", [(16, 24), (300, 300)], ids=["small", "large"])
def test_replicas_have_each_its_own(mesh8: jax.sharding.Mesh, shape: tuple[int, int]) -> None:
    value = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    wrong = value.copy()
    wrong[3, 1] += 1
    everywhere = NamedSharding(mesh8, PartitionSpec())
    devices = list(mesh8.devices.flat)
    shards = [jax.device_put(wrong if device == devices[5] else value, device) for device in devices]
    array = jax.make_array_from_single_device_arrays(shape, everywhere, shards)
    (found,) = fingerprint.start([(array_leaf(array), array)]).result().values()
    right = by_the_book(words_of(value))
    assert [part.device for part, told in found if told != right] == [devices[5].id]
    assert {told for part, told in found if part.device == devices[5].id} == {by_the_book(words_of(wrong))}


def test_many_leaves_at_once_have_each_its_own(mesh8: jax.sharding.Mesh) -> None:
    """Batched by shape: no leaf may get another's, whatever the size of the batch."""
    rng = np.random.default_rng(1)
    rows = NamedSharding(mesh8, PartitionSpec("data"))
    values = [rng.random((8, 2) if index % 3 else (16,), np.float32) for index in range(205)]
    leaves = [LeafSpec(path=(str(index),), kind="array", shape=value.shape) for index, value in enumerate(values)]
    arrays = [jax.device_put(value, rows) for value in values]
    found = fingerprint.start(zip(leaves, arrays, strict=True)).result()
    for one, value in zip(leaves, values, strict=True):
        once = {part.box: told for part, told in found[one.name]}
        assert fingerprints.total(once.values()) == by_the_book(words_of(value))


@pytest.mark.parametrize("joined", [True, False])
def test_positions_beyond_32_bits_count(joined: bool) -> None:
    """No machine here holds such an array: the shard's place in it is told, as the caller does."""
    value = np.arange(60, dtype=np.uint32).reshape(3, 20)
    columns, row, column = 3_000_000_000, 5_000_000_007, 2_999_999_980
    strides = np.array([columns, 1], np.uint64)
    first = row * columns + column
    program = fingerprint._program((jax.devices()[0],), True, True, joined)
    halves = fingerprint._halves
    lanes = program([jnp.asarray(value)], halves([[first]]), halves([strides]))
    wanted = [by_the_book(words.tolist(), first + index * columns, large=True) for index, words in enumerate(value)]
    assert fingerprints.as_text(np.asarray(lanes).reshape(4).tolist()) == fingerprints.total(wanted)


@given(st.data())
def test_any_changed_bit_any_swap_and_any_transposition_is_another_fingerprint(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    words = st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)  # few values: many ties
    value = np.array(data.draw(words), np.uint32).reshape(rows, columns)
    before = of(value)
    changed = value.copy()
    at = data.draw(st.integers(0, value.size - 1))
    changed.reshape(-1)[at] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert of(changed) != before
    order = np.array(data.draw(st.permutations(range(value.size))))
    moved = value.reshape(-1)[order].reshape(value.shape)
    assert (of(moved) == before) == np.array_equal(moved, value)


def test_signed_zero_and_the_payloads_of_nan_count() -> None:
    zeros, nans = np.array([0.0, -0.0], np.float32), np.array([0x7FC00001, 0x7FC00002], np.uint32).view(np.float32)
    assert len({of(jnp.asarray(value)) for value in (zeros[:1], zeros[1:], nans[:1], nans[1:])}) == 4


def test_the_lanes_look_random_and_independent() -> None:
    """5000 one-word arrays: every bit of every lane is set in about half, and no two bits go together."""
    prints = [of(np.array([word], np.uint32)) for word in range(1000)]
    bits = np.array([[int(told, 16) >> at & 1 for at in range(128)] for told in prints])
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.09
    together = np.corrcoef(bits.T) - np.eye(128)
    assert abs(together).max() < 0.2


def test_arrays_may_be_donated_and_overwritten_at_once() -> None:
    host, device = np.arange(1 << 16, dtype=np.float32), jnp.arange(1 << 20, dtype=jnp.float32)
    wanted = [of(host), of(device)]
    prints = fingerprint.start([(leaf("h", host.shape), host), (leaf("d", device.shape), device)])
    host[:] = 0
    jax.jit(lambda array: array * 0, donate_argnums=0)(device).block_until_ready()
    found = prints.result()
    assert [fingerprints.total(told for _, told in found[name]) for name in ("h", "d")] == wanted


# As numbers.

PRINT, OTHER = "0" * 31 + "1", "0" * 31 + "2"


def told(process: int, *prints: ShardFingerprint) -> tuple[int, Any]:
    return process, receipt(process, prints={"w": prints})


def test_sums_wrap_by_lane_and_condensing_is_linear_and_sees_every_leaf() -> None:
    assert fingerprints.total(["ffffffff" * 4, "00000002" * 4]) == "00000001" * 4
    one, two = {"a": PRINT, "b": OTHER}, {"a": OTHER, "b": "ffffffff" * 4}
    both = {name: fingerprints.total([one[name], two[name]]) for name in one}
    assert fingerprints.total([fingerprints.condensed(one), fingerprints.condensed(two)]) == fingerprints.condensed(
        both
    )
    assert fingerprints.condensed(one) != fingerprints.condensed({**one, "b": PRINT})
    with pytest.raises(Damaged, match="expected 32 hex digits"):
        fingerprints.total(["12"])


def test_replicas_that_differ_are_named_with_shard_process_host_and_device() -> None:
    half = box((0, 2))
    receipts = dict([told(0, ShardFingerprint(half, PRINT, (0, 1))), told(1, ShardFingerprint(half, OTHER, (3,)))])
    (line,) = fingerprints.disagreements(intent(leaf("w"), processes=2), receipts)
    assert line == (
        f"w[0:2]: replicas disagree: process 0 (host-0) devices 0, 1: {PRINT} but process 1 (host-1) device 3: {OTHER}"
    )
    assert (
        fingerprints.disagreements(intent(leaf("w"), processes=2), dict([told(0, ShardFingerprint(half, PRINT, (0,)))]))
        == []
    )


def test_a_fingerprint_is_recorded_only_of_an_array_whose_every_shard_has_one() -> None:
    halves = ShardFingerprint(box((0, 2)), PRINT, (0,)), ShardFingerprint(box((2, 4)), OTHER, (1,))
    spread = dict([told(0, halves[0]), told(1, *halves)])
    assert fingerprints.fingerprints(intent(leaf("w"), processes=2), spread) == {
        "w": fingerprints.total([PRINT, OTHER])
    }
    assert fingerprints.fingerprints(intent(leaf("w"), processes=2), dict([told(0, halves[0])])) == {}

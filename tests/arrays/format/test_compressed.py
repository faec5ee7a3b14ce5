"""Compressed chunks: what they may decode to is known before anything is decoded."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import orchestrator as oc
from orchestrator.arrays.format.compressed import chunk_shape, decoded_bytes_max, deflated, inflated
from orchestrator.errors import Damaged
from orchestrator.rules.records import LeafSpec
from tests.proof.forged import zstd_zeros
from tests.support.runs import now

BODIES = {
    "zeros": bytes(3 << 20),
    "noise": random.Random(1).randbytes(1 << 20),
    "text": b"abc" * 100,
    "one byte": b"x",
    "floats": np.arange(1 << 18, dtype=np.float32).tobytes(),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_chunk_comes_back_and_its_size_is_bounded_by_its_blocks(body: bytes) -> None:
    packed = deflated(memoryview(body))
    assert bytes(inflated(packed, len(body), lambda: "here")) == body
    assert len(body) <= decoded_bytes_max(memoryview(packed)) <= 4 * len(body) + (128 << 10)


def test_a_bomb_is_not_decoded() -> None:
    bomb = zstd_zeros(4 << 30)
    assert len(bomb) < 140_000 and decoded_bytes_max(memoryview(bomb)) == 4 << 30
    with pytest.raises(Damaged, match=r"here: .* decodes to up to 4294967296 bytes, expected 4096"):
        inflated(bomb, 4096, lambda: "here")
    assert bytes(inflated(zstd_zeros(1 << 20), 1 << 20, lambda: "here")) == bytes(1 << 20)  # it is zstd


@pytest.mark.parametrize("cut", [1, 5, 7, 12, 15, 19])
def test_a_frame_that_ends_early_is_damage(cut: int) -> None:
    packed = deflated(memoryview(b"abc" * 100))
    with pytest.raises(Damaged, match="not the chunk that zstd has made of 300 bytes"):
        inflated(packed[:cut], 300, lambda: "here")


@pytest.mark.parametrize("body", [b"no zstd at all", zstd_zeros(1 << 17), zstd_zeros(1 << 17)[:-1] + b"", b""])
def test_what_is_no_chunk_of_that_size_is_damage(body: bytes) -> None:
    with pytest.raises(Damaged, match="here: not the chunk"):
        inflated(body, 300, lambda: "here")


LEAF = LeafSpec(path=("w",), kind="array", shape=(4, 6), dtype="float32")
METADATA: dict[str, Any] = {
    "zarr_format": 3,
    "shape": [4, 6],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 6]}},
    "chunk_key_encoding": {"name": "default"},
    "codecs": [{"name": "bytes"}, {"name": "zstd"}, {"name": "crc32c"}],
}


def regular(*chunk: object) -> dict[str, Any]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}}}


def test_the_chunk_shape_is_the_metadatas() -> None:
    assert chunk_shape(json.dumps(METADATA).encode(), LEAF, "here") == (2, 6)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [4, 7]},
        {"data_type": "float64"},
        {"zarr_format": 2},
        *(regular(*chunk) for chunk in ((1 << 30, 1 << 30), (3, 6), (0, 6), (-2, 6), (2,), (2.0, 6), (True, 6), ())),
        {"chunk_grid": {"name": "regular"}},
        {"chunk_grid": None},
        {"codecs": [{"name": "bytes"}, {"name": "sharding_indexed"}]},
        {"codecs": "bytes"},
        {"chunk_key_encoding": {"name": "v2"}},
    ],
    ids=str,
)
def test_metadata_of_another_array_is_damage(change: dict[str, Any]) -> None:
    with pytest.raises(Damaged, match="here: "):
        chunk_shape(json.dumps({**METADATA, **change}).encode(), LEAF, "here")


def test_a_chunk_larger_than_ours_are_is_not_decoded_though_its_array_is_as_large() -> None:
    side = 1 << 15
    leaf = LeafSpec(path=("w",), kind="array", shape=(side, side), dtype="float32")
    told = {**METADATA, "shape": [side, side], **regular(side, side)}
    with pytest.raises(Damaged, match="here: describes another array"):
        chunk_shape(json.dumps(told).encode(), leaf, "here")
    assert chunk_shape(json.dumps({**told, **regular(32, side)}).encode(), leaf, "here") == (32, side)  # 4 MiB


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 100_000, b"null", b"[]"])
def test_what_is_no_metadata_is_damage(body: bytes) -> None:
    with pytest.raises(Damaged, match="here: not the description of an array"):
        chunk_shape(body, LEAF, "here")


def test_another_saves_compressed_chunk_is_noticed_though_all_of_it_is_whole(root: Path) -> None:
    """Two saves of one value have files of one size, whose checksums are all right."""
    with oc.Agent(root, options=now(compression=True)) as agent:
        for step in (1, 2):
            agent.save(step, {"w": jnp.full(100_000, float(step))})
    one, two = (
        max(root.glob(f"steps/0000000{step}/*/state/**/d/*"), key=lambda p: p.stat().st_size) for step in (1, 2)
    )
    assert one.stat().st_size == two.stat().st_size
    two.write_bytes(one.read_bytes())
    with pytest.raises(oc.Damaged, match="belongs to another save"):
        oc.open_run(root).restore(step=2)
    assert oc.open_run(root).restore().step == 1


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

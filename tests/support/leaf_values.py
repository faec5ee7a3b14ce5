"""Values of every dtype and every bit pattern, and whether two trees have the same bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import orchestrator as oc

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


def came_back(agent: oc.Agent, state: Any, like: Any = None, **arguments: Any) -> Any:
    """`state` saved, and restored into `like` (itself by default)."""
    step = (agent.latest_step() or 0) + 1
    assert agent.save(step, state)
    restored = agent.restore(state if like is None else like, **arguments)
    assert restored is not None and restored.step == step
    return restored.state

"""The types of numbers that an array store can hold, by name. Pure: neither numpy nor JAX."""

from __future__ import annotations

# What TensorStore's zarr3 driver (0.1.86) has a data type for, and the bytes of one element on the host;
# tests/arrays/test_leaf_kinds.py asks it.
ITEM_BYTES = {
    "bool": 1,
    "int2": 1,
    "int4": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "float4_e2m1fn": 1,
    "float8_e3m4": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e4m3b11fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
# dtypes that JAX has and TensorStore has not: stored as another of the same width, bit for bit.
STORED_AS = {"uint2": "int2", "uint4": "int4", "float8_e4m3": "uint8"}

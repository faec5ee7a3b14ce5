"""Chunks of ours that zstd has made smaller: made, read back, and bounded before anything decodes them.

A decoder writes whatever its input asks for: 4 GiB come out of 131 KB. How much a chunk holds follows from its array's
shape and from the headers of its blocks, so that more is never decoded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from orchestrator.errors import Damaged
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.records import LeafSpec
from orchestrator.rules.zarr_chunks import CHUNK_BYTES

ZSTD = {"name": "zstd", "configuration": {"level": 1}}
_CODECS = ("bytes", "zstd", "crc32c")
_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 128 << 10  # zstd's blocks decode to at most so much
_SLACK = 64  # blocks may be that much shorter on average: zstd splits them where what they hold changes
_SLACK_BYTES = 512 << 20
_CHUNK_BYTES_MAX = 16 * CHUNK_BYTES  # of ours, and some: what decodes them ends the process if it has no memory
_TIMEOUT_S = 60.0  # of TensorStore, in memory


def deflated(raw: memoryview) -> bytes:
    """zstd by TensorStore's own codec: one array of bytes, one chunk, in memory."""
    array = _opened(len(raw))
    array.write(np.frombuffer(raw, np.uint8)).result(timeout=_TIMEOUT_S)
    store: Any = array.kvstore
    return bytes(store.read("c/0").result(timeout=_TIMEOUT_S).value)


def inflated(body: bytes | memoryview, size: int, where: Callable[[], str]) -> memoryview:
    """The `size` bytes that `body` was made of. Raises Damaged, beginning with `where()`, if it holds anything else."""
    try:
        most = decoded_bytes_max(memoryview(body))
        if most > max(size + (1 << 20), min(_SLACK * size, size + _SLACK_BYTES)):
            raise ValueError(f"decodes to up to {most} bytes, expected {size}")
        array = _opened(size)
        store: Any = array.kvstore
        store.write("c/0", bytes(body)).result(timeout=_TIMEOUT_S)
        found: memoryview = array.read().result(timeout=_TIMEOUT_S).data
    except ValueError as error:
        raise Damaged(f"{where()}: not the chunk that zstd has made of {size} bytes: {error}") from error
    return found


def _opened(size: int) -> Any:
    spec = {
        "driver": "zarr3",
        "kvstore": "memory://",
        "metadata": {
            "data_type": "uint8",
            "shape": [size],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [size]}},
            "codecs": [{"name": "bytes"}, ZSTD],
            "fill_value": 0,
        },
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True).result(timeout=_TIMEOUT_S)


def decoded_bytes_max(body: memoryview) -> int:
    """At most so much comes out of zstd's frames (RFC 8878), by the headers of their blocks. Raises ValueError."""
    at = total = 0
    while at < len(body):
        checksum = 4 * (_frame_flags(body, at) >> 2 & 1)
        at, last = _first_block(body, at), False
        while not last:
            header = int.from_bytes(_part(body, at, 3), "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            if kind == 3 or size > _BLOCK_BYTES:
                raise ValueError("a block of no kind of zstd's")
            total += _BLOCK_BYTES if kind == 2 else size
            at += 3 + (1 if kind == 1 else size)
        at += checksum
    if at != len(body):
        raise ValueError("ends too early")
    return total


def _first_block(body: memoryview, at: int) -> int:
    flags = _frame_flags(body, at)
    single = flags >> 5 & 1
    dictionary = (0, 1, 2, 4)[flags & 3]
    content_size = (single, 2, 4, 8)[flags >> 6]
    return at + 5 + (1 - single) + dictionary + content_size


def _frame_flags(body: memoryview, at: int) -> int:
    if _part(body, at, 4) != _MAGIC:
        raise ValueError("no frame of zstd's")
    return _part(body, at + 4, 1)[0]


def _part(body: memoryview, at: int, size: int) -> bytes:
    part = bytes(body[at : at + size])
    if len(part) != size:
        raise ValueError("ends too early")
    return part


def chunk_shape(metadata: bytes, leaf: LeafSpec, where: str) -> tuple[int, ...]:
    """The chunk shape in an array's `zarr.json`. Raises Damaged unless it is what we write for this leaf."""
    try:
        parsed = json.loads(metadata)
        grid = parsed["chunk_grid"]["configuration"]["chunk_shape"]
        fits = (
            parsed["zarr_format"] == 3
            and tuple(parsed["shape"]) == leaf.file_shape
            and parsed["data_type"] == (leaf.stored_dtype or leaf.dtype)
            and parsed["chunk_grid"]["name"] == "regular"
            and parsed["chunk_key_encoding"]["name"] == "default"
            and parsed["chunk_key_encoding"].get("configuration", {"separator": "/"}) == {"separator": "/"}
            and tuple(codec["name"] for codec in parsed["codecs"]) == _CODECS
            and len(grid) == len(leaf.file_shape)
            and all(type(size) is int for size in grid)
            and math.prod(grid) * ITEM_BYTES[leaf.stored_dtype or leaf.dtype] <= _CHUNK_BYTES_MAX
            and all(size >= 1 and whole % size == 0 for size, whole in zip(grid, leaf.file_shape, strict=True))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{where}: not the description of an array: {error!r:.200}") from error
    if not fits:
        text = metadata.decode(errors="replace")
        raise Damaged(f"{where}: describes another array than {leaf.label}{list(leaf.file_shape)}: {text:.400}")
    return tuple(grid)

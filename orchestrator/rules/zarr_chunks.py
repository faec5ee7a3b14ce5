"""How an array is cut into chunks, and what a chunk is: zarr3 keys, metadata and checksums. Pure.

A chunk object is the chunk's elements in C order, little-endian, followed by their CRC-32C as four little-endian bytes:
zarr3's `bytes` and `crc32c` codecs (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/crc32c/index.html), which any
zarr3 reader checks. In a data file the CRC-32Cs of a large chunk's parts follow it, so that a part can be read and
checked alone; zarr3 readers do not see them. Chunks are runs of whole rows of one shard, so that cutting and joining
them is plain copying, or tiles of it, of which another mesh needs few. Which of the two is told from the chunk shape
alone: nobody has to know how it came about.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence

from orchestrator.rules.records import Box

CHECKSUM_BYTES = 4
CHUNK_BYTES = 4 << 20
PART_BYTES = 256 << 10  # of a chunk, checked by itself; part of the format
_TILE_BYTES = PART_BYTES  # smaller chunks cost more time than reading more than is needed
_RUN_BYTES = 1 << 10  # of a tile's row: with shorter ones, copying them takes longer than reading
_TILES = (8, 4, 2)  # along a dimension: meshes have powers of two
_POLYNOMIAL = 0x82F63B78  # CRC-32C's, reflected


def chunk_shape(shard: tuple[int, ...], item_bytes: int, target_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """The largest chunk of at most `target_bytes` that tiles a shard and is contiguous in it (one element at least)."""
    shape = list(shard)
    for axis, size in enumerate(shard):
        inner = math.prod(shard[axis + 1 :]) * item_bytes
        if size * inner <= target_bytes:
            break
        rows = max(1, target_bytes // max(inner, 1))
        shape[axis] = next(count for count in range(min(rows, size), 0, -1) if size % count == 0)
        if shape[axis] > 1:
            break
    return tuple(shape)


def tile_shape(shard: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """A chunk that tiles a shard and has little of each dimension but the first, of which parts of it can be read."""
    tile, size, run_bytes = list(shard), math.prod(shard) * item_bytes, item_bytes
    for axis in range(len(shard) - 1, 0, -1):
        for count in _TILES:
            part_bytes = run_bytes * tile[axis] // count
            if tile[axis] % count == 0 and part_bytes >= _RUN_BYTES and size // count >= _TILE_BYTES:
                tile[axis], size = tile[axis] // count, size // count
                break
        run_bytes *= tile[axis]
    return chunk_shape(tuple(tile), item_bytes)


def cut(box: Box, chunk: tuple[int, ...]) -> Iterator[Box]:
    """The chunks of a box whose bounds lie on the chunk grid, in C order."""
    starts = [range(start, stop, size) for start, stop, size in zip(box.start, box.stop, chunk, strict=True)]
    for start in itertools.product(*starts):
        yield Box(start=start, stop=tuple(first + size for first, size in zip(start, chunk, strict=True)))


def touching(box: Box, chunk: tuple[int, ...]) -> Iterator[Box]:
    """The chunks that hold any element of `box`, which may lie anywhere."""
    bounds = [
        (start // size * size, -(-stop // size) * size)
        for start, stop, size in zip(box.start, box.stop, chunk, strict=True)
    ]
    return cut(Box(start=tuple(low for low, _ in bounds), stop=tuple(high for _, high in bounds)), chunk)


def key(name: str, box: Box, chunk: tuple[int, ...]) -> str:
    """The store key of the chunk at `box` of the array `name` (zarr3's default chunk key encoding)."""
    return name + suffix(box, chunk)


def suffix(box: Box, chunk: tuple[int, ...]) -> str:
    """The part of a chunk's key that is the same in all arrays cut the same way."""
    return "".join(["/c", *(f"/{start // size}" for start, size in zip(box.start, chunk, strict=True))])


def metadata_key(name: str) -> str:
    return f"{name}/zarr.json"


def metadata(template: dict[str, object], shape: tuple[int, ...], chunk: tuple[int, ...]) -> bytes:
    """`zarr.json` of an array: `template` (TensorStore's own, for the data type) with this shape and chunk shape."""
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
    return json.dumps({**template, "shape": list(shape), "chunk_grid": grid}, separators=(",", ":")).encode()


def combined_crc32c(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32C of two byte strings one after the other, from that of each: nothing has to be read again.

    As zlib's crc32_combine: appending n bytes multiplies a CRC by x^8n modulo the polynomial.
    """
    return _product(_power(8 * second_bytes), first) ^ second


def parts(size: int) -> list[tuple[int, int]]:
    """First byte and end of each part of a chunk of `size` bytes; [] of one so small that it has none."""
    if size <= PART_BYTES:
        return []
    return [(first, min(first + PART_BYTES, size)) for first in range(0, size, PART_BYTES)]


def joined_crc32c(checksums: Sequence[int], size: int) -> int:
    """The CRC-32C of a chunk of `size` bytes, from those of its parts."""
    low, second, third, high = _part_tables()
    found = 0
    for checksum in checksums[:-1]:
        found = low[found & 255] ^ second[found >> 8 & 255] ^ third[found >> 16 & 255] ^ high[found >> 24] ^ checksum
    return combined_crc32c(found, checksums[-1], size - PART_BYTES * (len(checksums) - 1))


@functools.cache
def _part_tables() -> tuple[list[int], ...]:
    """What PART_BYTES more make of a CRC, for each value of each of its bytes, the lowest first."""
    tables = []
    for byte in range(4):
        table = [0]
        for bit in range(8):
            moved = _product(_power(8 * PART_BYTES), 1 << 8 * byte + bit)
            table += [moved ^ one for one in table]
        tables.append(table)
    return tuple(tables)


@functools.lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """x^exponent modulo the polynomial; bit 31 is x^0."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _product(square, result)
        square = _product(square, square)
        exponent >>= 1
    return result


def _product(a: int, b: int) -> int:
    total = 0
    while a:
        if a & 0x80000000:
            total ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return total

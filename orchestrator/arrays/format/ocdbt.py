"""OCDBT stores as bytes: what we write and what we read of the format, without I/O.

The format is TensorStore's (https://google.github.io/tensorstore/kvstore/ocdbt/index.html): a manifest names the root
of a B+tree; the leaves of the tree hold small values, and for larger ones the place in a data file. TensorStore calls
the format not yet stable; tests/arrays/format/test_ocdbt.py holds ours against TensorStore's own reader and writer.
Columns of numbers are varints; they are coded with numpy, as a state may have a hundred thousand chunks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np

from orchestrator.errors import Damaged
from orchestrator.rules.chunk_index import Chunk, Location
from orchestrator.rules.kept import kept
from orchestrator.rules.keys import STORE

MANIFEST = STORE
NOT_OURS = "the store's tree is compressed or in parts; none of ours is"
INLINE_BYTES = 1024  # values up to this are in the tree itself
NODE_BYTES_MAX = 100_000_000  # what Orbax sets, too: TensorStore rejects larger ones
_KEYS_BYTES_MAX = 1 << 28  # of a node's keys, each whole: in the node, what two have in common is there once
_VARINT_BYTES_MAX = 10
_NODE_ENTRIES = 16384
_KEPT_KEYS_MAX = 2 * _NODE_ENTRIES  # of a node whose keys are kept for the next one
_INT64_MAX = 2**63 - 1
_MANIFEST_MAGIC, _NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
_ARITY_LOG2 = 4
_FOOTER_BYTES = 4

_Numbers = np.ndarray[Any, np.dtype[np.int64]]
_Unsigned = np.ndarray[Any, np.dtype[np.uint64]]


class Unsupported(Exception):
    """A store that TensorStore reads and we do not (compressed nodes, several manifests)."""


@dataclass(frozen=True)
class NodeRef:
    """Where a node is. `transitive`: what its data file paths are relative to. `height`: above the leaves."""

    place: Location
    transitive: str
    height: int


@dataclass(frozen=True)
class _Summary:
    """A node, as its parent describes it."""

    first_key: bytes
    place: Location
    keys: int
    tree_bytes: int
    value_bytes: int


# Writing.


@dataclass(frozen=True)
class Columns:
    """Values, in the order of their keys: the number in `paths` of each one's data file (-1: it is in the tree itself),
    offset there (of those in the tree: any) and bytes; and the values in the tree."""

    paths: Sequence[bytes]
    files: _Numbers
    offsets: _Numbers
    sizes: _Numbers
    inline: Sequence[bytes]


def encode(
    keys: Sequence[bytes], values: Sequence[Chunk], path: str, offset: int, uuid: bytes, time_ns: int
) -> tuple[bytes, bytes]:
    """The tree's nodes, to be put at `offset` of the data file `path`, and the manifest. `keys` in order."""
    numbers: dict[str, int] = {}
    places = [("", 0, len(value)) if isinstance(value, bytes) else value for value in values]
    files = [-1 if isinstance(value, bytes) else numbers.setdefault(value[0], len(numbers)) for value in values]
    columns = Columns(
        [name.encode() for name in numbers],
        np.array(files, np.int64),
        np.array([at for _, at, _ in places], np.int64),
        np.array([size for _, _, size in places], np.int64),
        [value for value in values if isinstance(value, bytes)],
    )
    return encode_columns(keys, columns, path, offset, uuid, time_ns)


def encode_columns(
    keys: Sequence[bytes], values: Columns, path: str, offset: int, uuid: bytes, time_ns: int
) -> tuple[bytes, bytes]:
    """The same, of values as columns."""
    nodes: list[bytes] = []
    leaves: list[_Summary] = []
    inline_before = 0
    keyed = _kept_key_columns(keys) if isinstance(keys, tuple) else _key_columns(keys)
    for first in range(0, len(keys), _NODE_ENTRIES):
        rows = slice(first, first + _NODE_ENTRIES)
        files, sizes = values.files[rows], values.sizes[rows]
        inline = values.inline[inline_before : inline_before + int(np.sum(files < 0))]
        inline_before += len(inline)
        part = Columns(values.paths, files, values.offsets[rows], sizes, inline)
        body = _leaf(keyed[len(leaves)], part)
        indirect = int(np.sum(sizes[files >= 0]))
        leaves.append(_Summary(keys[first], (path, offset, len(body)), len(files), len(body), indirect))
        nodes.append(body)
        offset += len(body)
    root, height = leaves[0], 0
    if len(leaves) > 1:
        body, height = _interior(leaves), 1
        root = _Summary(
            first_key=b"",
            place=(path, offset, len(body)),
            keys=sum(leaf.keys for leaf in leaves),
            tree_bytes=len(body) + sum(leaf.tree_bytes for leaf in leaves),
            value_bytes=sum(leaf.value_bytes for leaf in leaves),
        )
        nodes.append(body)
    return b"".join(nodes), _manifest(root, height, uuid, time_ns)


def _manifest(root: _Summary, height: int, uuid: bytes, time_ns: int) -> bytes:
    path, offset, size = root.place
    config = uuid + b"\0" + _varints([INLINE_BYTES, NODE_BYTES_MAX]) + bytes([_ARITY_LOG2, 0])
    generation, file = 1, 0
    version = _varints([1, generation]) + bytes([height])
    version += _varints([file, offset, size, root.keys, root.tree_bytes, root.value_bytes])
    return _framed(
        _MANIFEST_MAGIC, config + _file_table([path.encode()]) + version + time_ns.to_bytes(8, "little") + b"\0"
    )


def _key_columns(keys: Sequence[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    """Of each leaf."""
    return [_keys(keys[first : first + _NODE_ENTRIES]) for first in range(0, len(keys), _NODE_ENTRIES)]


# All saves of a form have the same.
_kept_key_columns: Callable[[tuple[bytes, ...]], list[tuple[bytes, bytes, bytes]]] = kept(_key_columns)


def _leaf(keys: tuple[bytes, bytes, bytes], values: Columns) -> bytes:
    in_file = values.files >= 0
    numbers, files = np.unique(values.files[in_file], return_inverse=True)  # the node has a table of its own
    parts = [
        b"\0",
        _file_table([values.paths[number] for number in numbers.tolist()]),
        _varints([len(values.sizes)]),
        *keys,
        _varints(values.sizes),
        in_file.tobytes(),
        _varints(files),
        _varints(values.offsets[in_file]),
        *values.inline,
    ]
    return _framed(_NODE_MAGIC, b"".join(parts))


def _interior(children: Sequence[_Summary]) -> bytes:
    prefixes, suffixes, tails = _keys([child.first_key for child in children])
    parts = [
        b"\1",
        _file_table([children[0].place[0].encode()]),
        _varints([len(children)]),
        prefixes,
        suffixes,
        bytes(len(children)),  # no common prefix is taken off a child's keys
        tails,
        bytes(len(children)),  # all in one data file
        _varints([child.place[1] for child in children]),
        _varints([child.place[2] for child in children]),
        _varints([child.keys for child in children]),
        _varints([child.tree_bytes for child in children]),
        _varints([child.value_bytes for child in children]),
    ]
    return _framed(_NODE_MAGIC, b"".join(parts))


def _keys(keys: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    """Sorted keys as columns: lengths of the prefixes shared with the key before, lengths of the rest, the rests."""
    lengths = np.array(list(map(len, keys)), np.int64)
    padded = np.array(keys, f"S{np.max(lengths)}").view(np.uint8).reshape(len(keys), -1)
    differ = padded[1:] != padded[:-1]
    shared = np.minimum(differ.argmax(axis=1), np.minimum(lengths[1:], lengths[:-1]))
    taken = np.concatenate(([0], shared))
    column = np.arange(padded.shape[1])
    rests = padded[(column >= taken[:, None]) & (column < lengths[:, None])].tobytes()
    return _varints(shared), _varints(lengths - taken), rests


def _file_table(paths: Sequence[bytes]) -> bytes:
    none = bytes(max(0, len(paths) - 1))
    return b"".join([_varints([len(paths)]), none, _varints(list(map(len, paths))), bytes(len(paths)), *paths])


def _framed(magic: int, body: bytes) -> bytes:
    size = 4 + 8 + 2 + len(body) + _FOOTER_BYTES
    framed = magic.to_bytes(4, "big") + size.to_bytes(8, "little") + b"\0\0" + body
    return framed + crc32c.crc32c(framed).to_bytes(_FOOTER_BYTES, "little")


def _varints(numbers: Sequence[int] | _Numbers) -> bytes:
    left = np.asarray(numbers, np.uint64)
    if not left.size:
        return b""
    lengths = np.ones(left.shape, np.int64)
    for shift in range(7, int(np.max(left)).bit_length(), 7):
        lengths += (left >> np.uint64(shift)) > 0
    out = np.empty(lengths.sum(), np.uint8)
    starts = np.cumsum(lengths) - lengths
    for index in range(int(np.max(lengths))):
        longer = lengths > index
        low = (left[longer] >> np.uint64(7 * index)) & np.uint64(0x7F)
        more = np.where(lengths[longer] > index + 1, np.uint64(0x80), np.uint64(0))
        out[starts[longer] + index] = low | more
    return out.tobytes()


# Reading.


class _Cursor:
    """Reads a body from front to back. Raises ValueError where it ends too early, or holds what cannot be."""

    def __init__(self, body: memoryview) -> None:
        self._body, self._all = body, np.frombuffer(body, np.uint8)
        self._at = 0

    def take(self, count: int) -> bytes:
        part = bytes(self._body[self._at : self._at + count])
        if len(part) != count:
            raise ValueError("ends too early")
        self._at += count
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        return self.numbers(1)[0]

    def numbers(self, count: int) -> list[int]:
        """`count` varints."""
        numbers: list[int] = self.column(count).tolist()
        return numbers

    def column(self, count: int) -> _Unsigned:
        """`count` varints, as an array."""
        if count <= 0:
            if count < 0:
                raise ValueError("a column of fewer than no numbers")
            return np.zeros(0, np.uint64)
        window = self._all[self._at : self._at + 10 * count]
        ends = np.flatnonzero(window[: 2 * count] < 0x80)
        if len(ends) < count:
            ends = np.flatnonzero(window < 0x80)
        if len(ends) < count:
            raise ValueError("ends too early")
        ends = ends[:count]
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - starts + 1
        if np.max(lengths) > _VARINT_BYTES_MAX:
            raise ValueError("a number of more than 64 bits")
        values = np.zeros(count, np.uint64)
        for index in range(int(np.max(lengths))):
            longer = lengths > index
            values[longer] |= (window[starts[longer] + index].astype(np.uint64) & np.uint64(0x7F)) << np.uint64(
                7 * index
            )
        self._at += int(ends[-1]) + 1
        return values

    def since(self, first: int) -> bytes:
        """What was read from there on."""
        return bytes(self._body[first : self._at])

    @property
    def at(self) -> int:
        return self._at

    def files(self) -> list[tuple[str, str]]:
        """A data file table: (base path, relative path) of each."""
        count = self.number()
        shared = [0, *self.numbers(count - 1)] if count else []
        lengths, bases = self.numbers(count), self.numbers(count)
        found, path = [], b""
        _check_shared(shared, lengths)
        for prefix, size, base in zip(shared, lengths, bases, strict=True):
            path = path[:prefix] + self.take(size)
            found.append((path[:base].decode(), path[base:].decode()))
        return found

    def keys(self, count: int, columns_between: int = 0) -> tuple[list[bytes], list[list[int]]]:
        shared, lengths = [0, *self.numbers(count - 1)], self.numbers(count)
        _check_shared(shared, lengths)
        between = [self.numbers(count) for _ in range(columns_between)]
        return _keys_of(shared, lengths, self.take(sum(lengths))), between

    def key_table(self, count: int, prefix: bytes) -> KeyTable:
        """As `keys`; the same object for the same keys as lately."""
        first = self._at
        self.column(count - 1)
        lengths = self.column(count)
        # Before they are summed up: 64 bits overflow.
        if count and int(np.max(lengths)) > _KEYS_BYTES_MAX:
            raise ValueError(f"a key of {int(np.max(lengths))} bytes")
        self.take(int(np.sum(lengths)))
        table = _kept_table if count <= _KEPT_KEYS_MAX else _table
        return table(self.since(first), count, prefix)


def _check_shared(shared: Sequence[int], lengths: Sequence[int]) -> None:
    """What each text has of the one before is there, and all of them written out are not too much."""
    if sum(shared) + sum(lengths) > _KEYS_BYTES_MAX:
        raise ValueError(f"keys of {sum(shared) + sum(lengths)} bytes")
    before = 0
    for prefix, size in zip(shared, lengths, strict=True):
        if prefix > before:
            raise ValueError("a key that has more in common with the one before than that is long")
        before = prefix + size


def _keys_of(shared: Sequence[int], lengths: Sequence[int], rests: bytes) -> list[bytes]:
    keys, key, at = [], b"", 0
    for prefix, size in zip(shared, lengths, strict=True):
        key = key[:prefix] + rests[at : at + size]
        at += size
        keys.append(key)
    if not all(map(operator.lt, keys, keys[1:])):
        raise ValueError("keys out of order")
    return keys


@dataclass(frozen=True, eq=False)
class KeyTable:
    """The keys of a leaf, in order, each with the prefix of all; and the row of each."""

    raw: Sequence[bytes]

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """Raises UnicodeDecodeError."""
        return dict(zip(map(bytes.decode, self.raw), range(len(self.raw)), strict=True))


def _table(columns: bytes, count: int, prefix: bytes) -> KeyTable:
    keys, _ = _Cursor(memoryview(columns)).keys(count)
    return KeyTable([prefix + key for key in keys] if prefix else keys)


# A process that restores a state again finds the same keys; for thousands of small leaves, making them out takes longer
# than reading them.
_kept_table = functools.lru_cache(maxsize=8)(_table)


@dataclass(frozen=True, eq=False)
class Entries:
    """What a leaf has for each of its keys, as columns. files: the number in `paths` of the data file that the value is
    in, -1: it is in `inline`. offsets: of the value there."""

    table: KeyTable
    paths: Sequence[str]
    files: _Numbers
    offsets: _Numbers
    sizes: _Numbers
    inline: bytes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[bytes, Chunk]]:
        return zip(self.table.raw, map(self.value, range(len(self))), strict=True)

    def value(self, row: int) -> Chunk:
        file, offset, size = int(self.files[row]), int(self.offsets[row]), int(self.sizes[row])
        return self.inline[offset : offset + size] if file < 0 else (self.paths[file], offset, size)


def decode_manifest(body: bytes, where: str) -> NodeRef | None:
    """The newest root of a store, None if it holds nothing. Raises Damaged, Unsupported."""
    cursor = _unframed(_MANIFEST_MAGIC, body, where)
    try:
        cursor.take(16)
        if cursor.number() != 0:
            raise Unsupported(f"{where}: in several parts")
        cursor.numbers(2)
        cursor.byte()
        if cursor.number() != 0:
            cursor.take(4)  # zstd's level
        files = cursor.files()
        count = cursor.number()
        cursor.numbers(count)
        heights = cursor.take(count)
        columns = [cursor.numbers(count) for _ in range(6)]
        file, offset, size = (column[-1] for column in columns[:3])
        if size == 0:
            return None
        base, relative = files[file]
    except (ValueError, IndexError) as error:
        raise Damaged(f"{where}: not a manifest of an OCDBT store: {error}") from error
    return NodeRef((base + relative, offset, size), base, heights[-1])


def decode_node(
    body: bytes, node: NodeRef, prefix: bytes, where: str
) -> tuple[Entries | None, list[tuple[bytes, NodeRef]]]:
    """A node's entries (None unless it is a leaf) and its children, each with the prefix of its keys. A child is one
    less high than its parent, so that every tree ends. Raises Damaged, Unsupported."""
    cursor = _unframed(_NODE_MAGIC, body, where)
    try:
        if cursor.byte() != node.height:
            raise ValueError(f"not of height {node.height}, as its parent has it")
        files = [(node.transitive + base, relative) for base, relative in cursor.files()]
        count = cursor.number()
        if node.height:
            return None, list(_children(cursor, files, count, prefix, node.height - 1))
        return _entries(cursor, files, count, prefix), []
    except (ValueError, IndexError) as error:
        raise Damaged(f"{where}: not a node of an OCDBT store: {error}") from error


def _entries(cursor: _Cursor, files: list[tuple[str, str]], count: int, prefix: bytes) -> Entries:
    keys = cursor.key_table(count, prefix)
    lengths, kinds = cursor.column(count), cursor.column(count)
    if count and int(np.max(kinds)) > 1:
        raise ValueError("values neither in the node nor in a file")
    in_file = kinds == 1
    indirect = int(np.count_nonzero(in_file))
    numbers, places = cursor.column(indirect), cursor.column(indirect)
    if indirect and (int(np.max(numbers)) >= len(files) or int(np.max(places)) > _INT64_MAX):
        raise ValueError("a value in no file")
    if count and int(np.max(lengths)) > _INT64_MAX:
        raise ValueError("a value of more than 63 bits of bytes")
    sizes = lengths.astype(np.int64)
    inline_sizes = np.where(in_file, 0, sizes)
    # Each by itself first: of made-up sizes the sum may be any number.
    if count and int(np.max(inline_sizes)) > NODE_BYTES_MAX:
        raise ValueError("ends too early")
    ends = np.cumsum(inline_sizes)
    inline = cursor.take(int(ends[-1]) if count else 0)
    offsets = ends - inline_sizes
    file_of = np.full(count, -1, np.int64)
    file_of[in_file], offsets[in_file] = numbers, places
    return Entries(keys, [base + relative for base, relative in files], file_of, offsets, sizes, inline)


def _children(
    cursor: _Cursor, files: list[tuple[str, str]], count: int, prefix: bytes, height: int
) -> Iterator[tuple[bytes, NodeRef]]:
    keys, (common,) = cursor.keys(count, columns_between=1)
    numbers, offsets, sizes = (cursor.numbers(count) for _ in range(3))
    for key, shared, file, offset, size in zip(keys, common, numbers, offsets, sizes, strict=True):
        base, relative = files[file]
        yield prefix + key[:shared], NodeRef((base + relative, offset, size), base, height)


def _unframed(magic: int, body: bytes, where: str) -> _Cursor:
    if len(body) <= 18 or int.from_bytes(body[:4], "big") != magic:
        raise Damaged(f"{where}: not a part of an OCDBT store")
    if int.from_bytes(body[4:12], "little") != len(body):
        raise Damaged(f"{where}: {len(body)} bytes, its header has {int.from_bytes(body[4:12], 'little')}")
    stored, computed = int.from_bytes(body[-_FOOTER_BYTES:], "little"), crc32c.crc32c(body[:-_FOOTER_BYTES])
    if stored != computed:
        raise Damaged(f"{where}: crc32c is {computed:08x}, it ends with {stored:08x}")
    if body[12:14] != b"\0\0":
        raise Unsupported(f"{where}: compressed")
    return _Cursor(memoryview(body)[14:-_FOOTER_BYTES])

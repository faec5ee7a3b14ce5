"""The one codec of stored records: bytes that carry their own checksum, and nothing else is let in or out.

Each record is one JSON object whose last field is the CRC-32C of the bytes before it, so a truncated or hand-edited
record is noticed by whoever reads it. Decoding is typed (msgspec: https://jcristharif.com/msgspec/structs.html), never
pickle, and what was decoded has passed `validate`: there is no other way to read a record. What is encoded has been
decoded again: a record that its own reader would reject is never written. Pure: no I/O, no clock.
"""

from __future__ import annotations

from typing import Any, TypeVar, get_type_hints

import msgspec
from msgspec import NODEFAULT, field, structs

from orchestrator.errors import Damaged, NewerFormat, Unavailable, UnsafeKey, UsageError
from orchestrator.rules import validate
from orchestrator.rules.kept_parts import KeptPart
from orchestrator.rules.records import FORMAT, Box, Intent, Receipt, Record, TreeSpec, crc32c

RECORD_BYTES_MAX = 512 << 20  # a manifest of a million chunks is an eighth of it; no store reads a larger one
_TAIL = b',"crc32c":"'
_END = b'"}\n'
_TAIL_BYTES = len(_TAIL) + 8 + len(_END)


class _Format(Record, frozen=True):
    format: int


AnyRecord = TypeVar("AnyRecord", bound=Record)

# Made by the thread that imports, before there are others: msgspec shows a type's description to all threads before it
# is whole, so that two threads that are the first to decode a kind crash the process (`StructInfo_Convert` in
# src/msgspec/_core.c, 0.22: no lock under the GIL, and describing a field runs Python).
_DECODERS: dict[type[Record], msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind) for kind in Record.__subclasses__()
}
# Of these kinds one field is decoded by itself, as it is mostly what it was in the record before.
_KEPT_PARTS: dict[type[Record], KeptPart[Any]] = {
    Intent: KeptPart("tree", TreeSpec, lambda tree: tree.leaves),
    Receipt: KeptPart("boxes", dict[str, tuple[Box, ...]]),
}


def _with_raw(kind: type[Record], name: str) -> Any:
    """A type with the same JSON as `kind`, whose field `name` is JSON that is not decoded."""
    hints = get_type_hints(kind) | {name: msgspec.Raw}
    fields = []
    for one in structs.fields(kind):
        default = one.default if one.default_factory is NODEFAULT else field(default_factory=one.default_factory)
        default = msgspec.Raw(b"{}") if one.name == name and default is not NODEFAULT else default
        fields.append((one.name, hints[one.name], *(() if default is NODEFAULT else (default,))))
    return msgspec.defstruct(kind.__name__, fields, frozen=True, kw_only=True, gc=False)


_WITH_RAW = {kind: _with_raw(kind, part.name) for kind, part in _KEPT_PARTS.items()}
_RAW_DECODERS = {kind: msgspec.json.Decoder(raw) for kind, raw in _WITH_RAW.items()}
# Whatever the bytes are: msgspec raises ValueErrors of its own, of UTF-8 and of Python's numbers, RecursionError for
# what is nested deeply.
_UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, ArithmeticError, RecursionError)


def encode(record: Record) -> bytes:
    """The stored bytes of a record: JSON, its own CRC-32C last, one newline. Deterministic for equal records.

    They have been decoded again, and are equal to `record`. Raises UsageError naming the field if its reader would
    reject it, or read something else.
    """
    kind = type(record)
    try:
        body = msgspec.json.encode(_with_text(record))[:-1]
        data = body + _TAIL + crc32c(body).encode() + _END
        again = _decoded(data, kind)
        if not _equal(again, record) and not _same(msgspec.to_builtins(again), msgspec.to_builtins(record)):
            raise validate.Invalid("JSON has no way to say all of it: it would be read as another one")
    except (*_UNREADABLE, UnsafeKey) as error:
        raise UsageError(f"this {kind.__name__} could not be read again, so it is not written: {error}") from error
    return data


def _equal(read: AnyRecord, given: AnyRecord) -> bool:
    """As `==`. What JSON has kept the order of is compared in order, half as long as by looking up each key: a manifest
    may have a million chunks."""
    part = _KEPT_PARTS.get(type(given))
    for name in given.__struct_fields__:
        was, now = getattr(given, name), getattr(read, name)
        if part and name == part.name:
            same = part.are_equal(was, now)
        elif type(was) is type(now) is dict:
            same = (list(was) == list(now) and list(was.values()) == list(now.values())) or was == now
        else:
            same = was == now
        if not same:
            return False
    return True


def _same(read: object, given: object) -> bool:
    """Whether two values are the same to JSON, which makes lists of tuples and texts of keys."""
    if isinstance(read, dict) and isinstance(given, dict):
        by_text = {str(key): value for key, value in given.items()}
        return read.keys() == by_text.keys() and all(_same(value, by_text[key]) for key, value in read.items())
    if isinstance(read, list | tuple) and isinstance(given, list | tuple):
        return len(read) == len(given) and all(map(_same, read, given))
    return read == given


def decode(data: bytes, kind: type[AnyRecord], where: str, **expected: object) -> AnyRecord:
    """Read back what `encode` wrote; `where` names the key in errors. `expected`: fields, and what they must be where
    the record was found (`step=100`): a copied or renamed one says otherwise.

    Raises NewerFormat if the record says it is of a later format; Damaged if it is truncated, edited, not of `kind`,
    out of bounds (`validate`) or in the wrong place; Unavailable if this process has no memory for it. Nothing else,
    whatever `data` is.
    """
    body, tail = data[:-_TAIL_BYTES], data[-_TAIL_BYTES:]
    signed = tail.startswith(_TAIL) and tail.endswith(_END)
    stated, got = tail[len(_TAIL) : -len(_END)].decode(errors="replace"), crc32c(body)
    # The checksum first: a format that a flipped bit has raised is damage. A newer one may be signed in another way.
    if signed and stated != got:
        raise Damaged(f"{where}: crc32c is {got}, the record says {stated}; it was edited or damaged, not used")
    if not signed:
        _check_format(data, where)
        raise Damaged(f"{where}: {len(data)} bytes that do not end in a checksum; truncated or not a record of a run")
    try:
        record = _decoded(data, kind)
    except MemoryError as error:
        raise Unavailable(f"{where}: {len(data)} bytes: no memory left to read them") from error
    except (*_UNREADABLE, UnsafeKey) as error:
        _check_format(data, where)
        if isinstance(error, UnsafeKey):
            raise UnsafeKey(f"{where}: {error}") from error
        raise Damaged(f"{where}: not a {kind.__name__}: {error}; not used") from error
    _check_format(data, where, getattr(record, "format", 0))
    for name, value in expected.items():
        if (found := getattr(record, name)) != value:
            raise Damaged(f"{where}: says it is {name} {found}, expected {value}; it was copied or renamed, not used")
    return record


def _decoded(data: bytes, kind: type[AnyRecord]) -> AnyRecord:
    if len(data) > RECORD_BYTES_MAX:
        raise validate.Invalid(f"{len(data)} bytes, expected at most {RECORD_BYTES_MAX}")
    part = _KEPT_PARTS.get(kind)
    record: AnyRecord = _in_parts(data, kind, part) if part else _DECODERS[kind].decode(data)
    validate.check(record)
    return record


def _with_text(record: Record) -> Any:
    """What has the same JSON."""
    part = _KEPT_PARTS.get(type(record))
    if part is None:
        return record
    text = msgspec.Raw(part.text_of(getattr(record, part.name)))
    return _WITH_RAW[type(record)](**structs.asdict(record) | {part.name: text})


def _in_parts(data: bytes, kind: Any, part: KeptPart[Any]) -> Any:
    read = structs.asdict(_RAW_DECODERS[kind].decode(data))
    return kind(**read | {part.name: part.part_of(bytes(read[part.name]))})


def _check_format(data: bytes, where: str, version: int | None = None) -> None:
    """Raises NewerFormat if a record is of one, as far as that can be read."""
    if version is None:
        try:
            version = _DECODERS[_Format].decode(data).format
        except (*_UNREADABLE, MemoryError):
            return
    if version > FORMAT:
        raise NewerFormat(f"{where}: format {version}, this version reads up to {FORMAT}; use a newer orchestrator")

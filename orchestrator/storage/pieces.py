"""Files on their way to another place, in pieces: what is not what its writer counted gets no name there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import crc32c

from orchestrator.rules.records import FileEntry, crc32

Piece = TypeVar("Piece", bound=bytes | memoryview)


def checked(
    known: FileEntry,
    pieces: Iterable[Piece],
    error: Callable[[str], Exception],
    passing: Callable[[int], None] = lambda count: None,
) -> Iterator[Piece]:
    """`pieces`, of the file `known`. If that is not what they are, raises `error`, of what they are instead, before the
    last one. passing: told of so many bytes before they go; what it raises ends it."""
    checksum, count, other = 0, 0, ""

    def check() -> None:
        if (count, f"{checksum:08x}") != (known.bytes, known.crc32c) or other not in ("", known.crc32):
            raise error(f"{count} bytes with crc32c {checksum:08x}{other and f', crc32 {other}'}")

    for piece in pieces:
        passing(len(piece))
        other = crc32(bytes(piece)) if known.crc32 and not count else ""  # files that have one come in one piece
        checksum, count = crc32c.crc32c(piece, checksum), count + len(piece)
        if count >= known.bytes:
            check()
        yield piece
    check()

"""Files in pieces: the last piece of what is not what was written never comes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from orchestrator.rules.records import file_entry
from orchestrator.storage.pieces import checked

KNOWN = file_entry("a", b"abcdef")
OTHER_TREE = replace(KNOWN, crc32="00000000")  # CRC-32C is the same for all files that end with their own
WRONG = {
    "cut off": (KNOWN, [b"abc", b"de"]),
    "nothing, whose checksum is the same": (replace(KNOWN, crc32c="00000000"), []),
    "longer": (KNOWN, [b"abc", b"defg"]),
    "longer by a piece": (KNOWN, [b"abcdef", b"g"]),
    "other bytes": (KNOWN, [b"abc", b"dex"]),
    "other bytes before": (KNOWN, [b"abx", b"def"]),
    "of another tree": (OTHER_TREE, [b"abcdef"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_last_piece_of_a_wrong_file_never_comes(case: str) -> None:
    known, pieces = WRONG[case]
    passed, came = list[int](), list[bytes]()

    def read() -> None:
        came.extend(checked(known, pieces, KeyError, passed.append))

    with pytest.raises(KeyError, match=r"bytes with crc32c"):
        read()
    assert sum(passed) == sum(map(len, pieces)), "what goes is told before it is compared"
    assert len(b"".join(came)) < 6 or case == "longer by a piece"


@pytest.mark.parametrize("pieces", [[b"abcdef"], [b"abc", b"def"], [b"abc", memoryview(b"def")]])
def test_the_file_itself_comes_as_it_is(pieces: list[bytes | memoryview]) -> None:
    assert list(checked(KNOWN, pieces, KeyError)) == pieces
    assert list(checked(file_entry("a", b""), [], KeyError)) == []


def test_what_is_told_of_the_bytes_may_end_it() -> None:
    def late(count: int) -> None:
        raise TimeoutError

    reading: Iterator[bytes] = checked(KNOWN, [b"abcdef"], KeyError, late)
    with pytest.raises(TimeoutError):
        next(reading)

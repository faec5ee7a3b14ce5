"""What the receipts of an attempt say is in its array store: every chunk, itself or its place. Pure.

A receipt comes from storage: where it says that a chunk is, is checked before it gets into the tree that readers trust.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator import layout
from orchestrator.chunks import CHECKSUM_BYTES
from orchestrator.errors import Damaged
from orchestrator.records import Receipt

Place = tuple[str, int, int]  # file below `state/`, offset, bytes
Chunk = bytes | Place  # itself, or where it is


def entries(receipts: Iterable[Receipt]) -> dict[str, Chunk]:
    """Key -> chunk or place. Raises Damaged naming the process whose receipt cannot be right."""
    found: dict[str, Chunk] = {}
    for receipt in receipts:
        own: dict[str, Chunk] = dict(receipt.small)
        for key, place in receipt.places.items():
            file = receipt.files[place.file] if 0 <= place.file < len(receipt.files) else None
            within = file and file.path.startswith(layout.STATE)
            if not (
                file and within and place.offset >= 0 and CHECKSUM_BYTES < place.bytes <= file.bytes - place.offset
            ):
                raise Damaged(
                    f"receipt of process {receipt.process} ({receipt.host}): chunk {key} is at {place.offset} "
                    f"({place.bytes} bytes) of file {place.file}, which is none of its files or shorter"
                )
            own[key] = (file.path.removeprefix(layout.STATE), place.offset, place.bytes)
        twice = next(iter(found.keys() & own.keys()), None)
        if twice is not None:
            raise Damaged(f"chunk {twice}: process {receipt.process} ({receipt.host}) and another one have written it")
        found |= own
    return found


def checksums(receipts: Iterable[Receipt]) -> dict[str, str]:
    """Key -> CRC-32C of each chunk's elements, in hex."""
    found: dict[str, str] = {}
    for receipt in receipts:
        found |= {key: place.crc32c for key, place in receipt.places.items()}
        found |= {key: body[: -CHECKSUM_BYTES - 1 : -1].hex() for key, body in receipt.small.items()}  # little-endian
    return found

"""What the receipts of an attempt, and then its manifest, say is in its array store. Pure.

A receipt comes from storage: where it says that a chunk is, is checked before it gets into the tree that readers trust.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import Damaged
from orchestrator.rules import keys, zarr_chunks
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.records import Box, LeafSpec, Manifest, Receipt
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES

Location = tuple[str, int, int]  # file below `state/`, offset, bytes
Chunk = bytes | Location  # itself, or where it is
_NO_FILE = ("", 0)


def _writers(key: str, receipts: Iterable[Receipt]) -> int:
    return sum(key in receipt.places or key in receipt.small for receipt in receipts)


def entries(receipts: Sequence[Receipt]) -> dict[str, Chunk]:
    """Key -> chunk or place. Raises Damaged naming the process whose receipt cannot be right."""
    found: dict[str, Chunk] = {}
    for receipt in receipts:
        own: dict[str, Chunk] = dict(receipt.small)
        files = {
            number: (file.path.removeprefix(keys.STATE), file.bytes)
            for number, file in enumerate(receipt.files)
            if file.path.startswith(keys.STATE)
        }
        for key, place in receipt.places.items():
            path, size = files.get(place.file, _NO_FILE)
            if not (place.offset >= 0 and CHECKSUM_BYTES < place.bytes <= size - place.offset):
                raise Damaged(
                    f"receipt of process {receipt.process} ({receipt.host}): chunk {key} is at {place.offset} "
                    f"({place.bytes} bytes) of file {place.file}, which is none of its files or shorter"
                )
            own[key] = (path, place.offset, place.bytes)
        total = len(found) + len(own)
        found |= own
        if len(found) != total:
            twice = next(key for key in own if _writers(key, receipts) > 1)
            raise Damaged(f"chunk {twice}: process {receipt.process} ({receipt.host}) and another one have written it")
    return found


@dataclass(frozen=True)
class StoredFiles:
    """What a manifest says is below `state/`. chunks: key in the array store -> CRC-32C, in hex. files: path -> bytes;
    whatever else lies there belongs to no step, and is not read."""

    chunks: Mapping[str, str]
    files: Mapping[str, int]

    def below(self, item: str) -> StoredFiles:
        """Of the directory `item` ('': all of it), which another writer's array store is."""
        prefix = f"{item}/" if item else ""
        inside = {path.removeprefix(prefix): size for path, size in self.files.items() if path.startswith(prefix)}
        return StoredFiles({}, inside)


def sizes(leaves: Iterable[LeafSpec]) -> dict[str, int]:
    """Key -> bytes, with the checksum, of the chunks that arrays of ours consist of, as far as the tree spec alone says
    so: not of compressed ones."""
    found: dict[str, int] = {}
    for leaf in leaves:
        if leaf.in_store and leaf.chunk is not None:
            size = math.prod(leaf.chunk) * ITEM_BYTES[leaf.stored_dtype or leaf.dtype] + CHECKSUM_BYTES
            whole = Box(start=(0,) * len(leaf.chunk), stop=leaf.file_shape)
            found |= {zarr_chunks.key(leaf.name, box, leaf.chunk): size for box in zarr_chunks.cut(whole, leaf.chunk)}
    return found


def stored(manifest: Manifest) -> StoredFiles:
    below = (entry for entry in manifest.files if entry.path.startswith(keys.STATE))
    return StoredFiles(manifest.chunks, {entry.path.removeprefix(keys.STATE): entry.bytes for entry in below})


def checksums(receipts: Iterable[Receipt]) -> dict[str, str]:
    """Key -> CRC-32C of each chunk's elements, in hex."""
    found: dict[str, str] = {}
    for receipt in receipts:
        for key, place in receipt.places.items():
            found[key] = place.crc32c
        for key, body in receipt.small.items():
            found[key] = body[: -CHECKSUM_BYTES - 1 : -1].hex()  # little-endian
    return found

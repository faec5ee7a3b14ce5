"""What the receipts of an attempt, and then its manifest, say is in its array store. Pure.

A receipt comes from storage: where it says that a chunk is, is checked before it gets into the tree that readers trust.
"""

from __future__ import annotations

import itertools
import math
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.errors import Damaged
from orchestrator.rules import keys, zarr_chunks
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.records import Box, LeafSpec, Manifest, Receipt
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES

Location = tuple[str, int, int]  # file below `state/`, offset, bytes
Chunk = bytes | Location  # itself, or where it is


@dataclass(frozen=True, eq=False)
class Chunks(Mapping[str, Chunk]):
    """Key -> chunk or place, as columns: of a job of thousands of hosts there are a million, and a tuple for each costs
    more than all else that is done with it. keys_in_files: of the chunks in data files; the columns have each one's
    file, a number in `paths` (below `state/`), offset, bytes. small: the chunks that are in the receipts themselves."""

    receipts: Sequence[Receipt]
    keys_in_files: Sequence[str]
    paths: Sequence[str]
    files: Sequence[int]
    offsets: Sequence[int]
    sizes: Sequence[int]
    small: Mapping[str, bytes]

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Key -> its row in the columns. Raises Damaged naming the process that has written a chunk which another one
        has written, too."""
        found = dict(zip(self.keys_in_files, range(len(self.keys_in_files)), strict=True))
        once = len(found) == len(self.keys_in_files) and not found.keys() & self.small.keys()
        if not once or len(self.small) != sum(len(receipt.small) for receipt in self.receipts):
            _raise_twice(self.receipts)
        return found

    def __getitem__(self, key: str) -> Chunk:
        number = self.numbers.get(key)
        if number is None:
            return self.small[key]
        return self.paths[self.files[number]], self.offsets[number], self.sizes[number]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.numbers, self.small)

    def __len__(self) -> int:
        return len(self.numbers) + len(self.small)


_FILE, _OFFSET, _BYTES, _CRC = map(operator.attrgetter, ("file", "offset", "bytes", "crc32c"))


def entries(receipts: Sequence[Receipt]) -> Chunks:
    """Raises Damaged naming the process whose receipt cannot be right."""
    chunk_keys: list[str] = []
    paths: list[str] = []
    files, offsets, sizes = array("q"), array("q"), array("q")
    small: dict[str, bytes] = {}
    for receipt in receipts:
        _check_places(receipt)
        places = receipt.places.values()
        chunk_keys += receipt.places
        files.extend(map(len(paths).__add__, map(_FILE, places)))
        offsets.extend(map(_OFFSET, places))
        sizes.extend(map(_BYTES, places))
        paths += [file.path.removeprefix(keys.STATE) for file in receipt.files]
        small |= receipt.small
    return Chunks(receipts, chunk_keys, paths, files, offsets, sizes, small)


def _check_places(receipt: Receipt) -> None:
    """Each is in a file of this receipt that is below `state/`."""
    ends = [file.bytes if file.path.startswith(keys.STATE) else -1 for file in receipt.files]
    for key, place in receipt.places.items():
        end = ends[place.file] if 0 <= place.file < len(ends) else -1
        if not (place.offset >= 0 and CHECKSUM_BYTES < place.bytes <= end - place.offset):
            raise Damaged(
                f"receipt of process {receipt.process} ({receipt.host}): chunk {key} is at {place.offset} "
                f"({place.bytes} bytes) of file {place.file}, which is none of its files or shorter"
            )


def _raise_twice(receipts: Iterable[Receipt]) -> None:
    seen: set[str] = set()
    for receipt in receipts:
        for key in itertools.chain(receipt.places, receipt.small):
            if key in seen:
                raise Damaged(
                    f"chunk {key}: process {receipt.process} ({receipt.host}) and another one have written it"
                )
            seen.add(key)


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
        found.update(zip(receipt.places, map(_CRC, receipt.places.values()), strict=True))
        for key, body in receipt.small.items():
            found[key] = body[: -CHECKSUM_BYTES - 1 : -1].hex()  # little-endian
    return found

"""Reading an attempt's chunks only to see whether they are what was saved."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import crc32c

from orchestrator.arrays.reading.chunk_checks import ChunkChecks, suspecting
from orchestrator.arrays.reading.chunk_source import OnBytes
from orchestrator.arrays.reading.kvstore import KvStore
from orchestrator.arrays.reading.kvstore_source import KvStoreSource
from orchestrator.arrays.reading.local_source import LocalSource
from orchestrator.errors import Damaged, Suspect
from orchestrator.rules.chunk_index import Chunk, StoredFiles
from orchestrator.rules.zarr_chunks import CHECKSUM_BYTES
from orchestrator.storage import local_path

_READS = 16  # under way at once


def check(
    directory: str,
    stored: StoredFiles,
    on_bytes: OnBytes = lambda read_bytes: None,
    sizes: Mapping[str, int | None] | None = None,
) -> dict[str, str]:
    """Read chunks of the `state/` at URL `directory`: those in `sizes`, of these sizes where they are known; None: all.

    By key: what is wrong with each that was not read as it was saved, which proves nothing yet. Holds a few at a time.
    Raises Suspect if the store is not as it should be, or its chunks are not those of the manifest; Unavailable.
    """
    with suspecting(directory):
        kvstore = KvStore(directory)
        index, begin = _opened(directory, kvstore, stored)
        _check_keys(directory, kvstore.keys() if index is None else index, stored)
        checks = ChunkChecks(directory, stored.chunks)
        return _read(directory, kvstore, begin, checks, on_bytes, sizes or dict.fromkeys(stored.chunks))


def _opened(
    directory: str, kvstore: KvStore, stored: StoredFiles
) -> tuple[Mapping[str, Chunk] | None, Callable[[str], Any]]:
    """The index, and how a chunk's read is begun. On a file system TensorStore looks up each key itself, as other
    readers of the checkpoint will."""
    if local_path(directory) is not None:
        return LocalSource(directory, stored).index(), kvstore.begin
    source = KvStoreSource(directory, kvstore, stored)
    return source.index(), source.begin_read


def _check_keys(directory: str, found: Iterable[str], stored: StoredFiles) -> None:
    """The store has the chunks that the manifest has, so that readers of either find the same. Raises Damaged."""
    chunks = {key for key in found if not key.endswith("/zarr.json")}
    if chunks != stored.chunks.keys():
        missing, unknown = sorted(stored.chunks.keys() - chunks), sorted(chunks - stored.chunks.keys())
        raise Damaged(
            f"{directory}: of {len(stored.chunks)} chunks in the manifest, the store's tree lacks "
            f"{len(missing)} {missing[:3]}, and it has {len(unknown)} more {unknown[:3]}"
        )


def _read(
    directory: str,
    kvstore: KvStore,
    begin: Callable[[str], Any],
    checks: ChunkChecks,
    on_bytes: OnBytes,
    sizes: Mapping[str, int | None],
) -> dict[str, str]:
    problems: dict[str, str] = {}
    waiting: deque[tuple[str, Any]] = deque()
    keys = iter(sizes)
    while True:
        waiting += [(key, begin(key)) for key in itertools.islice(keys, _READS - len(waiting))]
        if not waiting:
            return problems
        key, future = waiting.popleft()
        try:
            result = kvstore.result(f"chunk {key}", future, [key])
        except Suspect as suspect:
            problems[key] = str(suspect)
            continue
        on_bytes(len(result.value))
        body = result.value if result.state == "value" else b""
        stored_crc = int.from_bytes(body[-CHECKSUM_BYTES:], "little")
        if len(body) < CHECKSUM_BYTES or crc32c.crc32c(body[:-CHECKSUM_BYTES]) != stored_crc:
            problems[key] = f"chunk {key} in {directory} is missing or damaged"
        elif (size := sizes[key] or len(body)) != len(body):
            problems[key] = f"chunk {key} in {directory} has {len(body)} bytes, the tree spec {size}"
        elif problem := checks.other_save(key, stored_crc):
            problems[key] = problem

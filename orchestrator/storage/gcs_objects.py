"""Objects of a bucket beside the port: read in pieces, copied within Cloud Storage, dated. For what programs other than
ours have stored, whose objects may be of any size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime

import crc32c

from orchestrator.errors import StorageError, Unavailable
from orchestrator.storage.gcs import GcsStorage

PIECE_BYTES = 8 << 20  # in one request, and in memory
_TURNS_MAX = 100_000  # of one copy: each is at least a MiB, but for the last


def pieces(storage: GcsStorage, key: str) -> Iterator[bytes]:
    """An object, from its beginning; compared at the end with the CRC-32C that the store has of it. Raises
    StorageError."""
    about = storage.measure(key)
    if about is None:
        raise StorageError(f"get {storage.url}/{key}: no such object; it was there when it was listed")
    checksum = 0
    for start in range(0, about.bytes, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, about.bytes)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        reply = storage.ask("get", key, "GET", params={"alt": "media"}, headers=headers, most_bytes=PIECE_BYTES)
        if len(reply.body) != stop - start:
            raise Unavailable(f"get {storage.url}/{key}: {len(reply.body)} bytes from {start}, expected {stop - start}")
        checksum = crc32c.crc32c(reply.body, checksum)
        yield reply.body
    if f"{checksum:08x}" != about.crc32c:
        raise StorageError(
            f"get {storage.url}/{key}: arrived with crc32c {checksum:08x}, the store has {about.crc32c}; it was "
            "changed meanwhile, or the network damages data; try again"
        )


def copy(source: GcsStorage, source_key: str, target: GcsStorage, key: str, on_bytes: Callable[[int], None]) -> None:
    """Have the store itself copy an object, also from another bucket: no byte comes through this machine. `key` is of
    an attempt of this writer's: an object there already is one of an earlier try whose answer was lost. Raises
    StorageError."""
    path = f"{source.path(source_key)}/rewriteTo{target.path(key).removeprefix('/storage/v1')}"
    params, copied = {"ifGenerationMatch": "0"}, 0
    for _ in range(_TURNS_MAX):
        reply = source.ask("copy", source_key, "POST", path=path, params=params, passing=(412,))
        if reply.status == 412:
            there, wanted = target.measure(key), source.measure(source_key)
            if there and wanted and (there.bytes, there.crc32c) == (wanted.bytes, wanted.crc32c):
                on_bytes(there.bytes - copied)
                return
            raise StorageError(f"copy {source.url}/{source_key} to {target.url}/{key}: another object is there")
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            found = json.loads(reply.body)
            so_far = int(found.get("totalBytesRewritten", 0))
            on_bytes(so_far - copied)
            copied = so_far
            if found.get("done"):
                return
            params["rewriteToken"] = str(found["rewriteToken"])
            continue
        break
    raise Unavailable(f"copy {source.url}/{source_key}: answered with what is no state of a copy")


def stored_s(storage: GcsStorage, key: str) -> float:
    """When the object was stored, in seconds since 1970; 0 where the store does not say. Raises StorageError."""
    reply = storage.ask("stat", key, "GET", params={"fields": "updated"})
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return datetime.fromisoformat(json.loads(reply.body)["updated"]).timestamp()
    return 0.0

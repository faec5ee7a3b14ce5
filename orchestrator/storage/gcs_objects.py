"""Objects of a bucket beside the port: read and created in pieces, copied within Cloud Storage, dated. For what
programs other than ours have stored, and for what comes from files: objects of any size."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from urllib.parse import parse_qs, unquote, urlsplit

import crc32c

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.records import FileEntry
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_replies import Reply
from orchestrator.storage.port import Created, Exists

PIECE_BYTES = 8 << 20  # in one request, and in memory
_OF_A_PIECE = (201, 308, 404, 410, 412)
_TURNS_OF_A_PIECE = 10
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


def create(storage: GcsStorage, known: FileEntry, given: Iterator[bytes]) -> Created | Exists:
    """Create the object `known`, of the pieces `given`, if nothing is there: a piece is in memory at a time. The store
    compares the whole with `known`'s checksum before it gives it its name. Raises StorageError."""
    if known.bytes <= PIECE_BYTES:
        return storage.create(known.path, b"".join(given))
    folder, _, name = storage.path(known.path).rpartition("/")
    where, params = f"/upload{folder}", {"uploadType": "resumable", "ifGenerationMatch": "0"}
    about = {"name": unquote(name), "crc32c": base64.b64encode(bytes.fromhex(known.crc32c)).decode()}
    headers = {"Content-Type": "application/json; charset=UTF-8", "X-Upload-Content-Type": "application/octet-stream"}
    body = json.dumps(about).encode()
    reply = storage.ask(
        "create", known.path, "POST", path=where, params=params, headers=headers, body=body, passing=(412,)
    )
    if reply.status == 412:
        return Exists(b"")
    session = _session(storage, known.path, reply)
    first = 0
    for piece in _of_size(given, PIECE_BYTES):
        reply = _send_piece(storage, known, where, session, first, piece)
        if reply.status in (200, 201):
            return Created()
        if reply.status != 308:
            return Exists(b"")
        first += len(piece)
    raise Unavailable(f"create {storage.url}/{known.path}: all {known.bytes} bytes were sent, and there is no object")


def _session(storage: GcsStorage, key: str, reply: Reply) -> str:
    """By which the service knows the upload that it has begun."""
    named = {name.lower(): value for name, value in reply.headers.items()}
    found = parse_qs(urlsplit(named.get("location", "")).query).get("upload_id")
    if not found:
        raise Unavailable(f"create {storage.url}/{key}: answered without a place to send it to")
    return found[0]


def _send_piece(storage: GcsStorage, known: FileEntry, where: str, session: str, first: int, piece: bytes) -> Reply:
    """One piece, at `first`; what the service has not kept of it again. Sending bytes twice does no harm. Raises
    Unavailable where the upload has to begin anew."""
    params, end = {"uploadType": "resumable", "upload_id": session}, first + len(piece)
    for _ in range(_TURNS_OF_A_PIECE):
        headers = {"Content-Range": f"bytes {first}-{end - 1}/{known.bytes}"}
        reply = storage.ask(
            "create", known.path, "PUT", path=where, params=params, headers=headers, body=piece, passing=_OF_A_PIECE
        )
        if reply.status in (404, 410):
            raise Unavailable(f"create {storage.url}/{known.path}: the service knows of no such upload any more")
        named = {name.lower(): value for name, value in reply.headers.items()}
        kept = int(named["range"].rpartition("-")[2]) + 1 if reply.status == 308 and "range" in named else end
        if reply.status != 308 or kept >= end:
            return reply
        piece, first = piece[max(0, kept - first) :], max(first, kept)
    raise Unavailable(f"create {storage.url}/{known.path}: the service does not keep what it is sent")


def _of_size(given: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes, in pieces of `size`, but for the last."""
    kept = b""
    for piece in itertools.chain(given, [b""]):
        kept += piece
        while len(kept) >= size or (kept and not piece):
            yield kept[:size]
            kept = kept[size:]


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

"""Storage in a Google Cloud Storage bucket: `gs://bucket/prefix`.

`create` carries `ifGenerationMatch=0` and the body's CRC-32C, so the object appears whole or not at all, once. An
object is durable when the service has acknowledged it, and strongly consistent from then on: `make_durable` asks for
size and checksum and downloads nothing. Only names below the prefix are ever sent; names that come back and are not
plain keys (folder placeholders, `..`) are not entries and are never touched.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import quote

import crc32c
from msgspec.structs import replace

from orchestrator.errors import OutcomeUnknown, StorageError, Unavailable, UnsafeKey, UsageError
from orchestrator.observe.events import CredentialsRejected, emit
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import check_key
from orchestrator.rules.records import FileEntry
from orchestrator.storage.gcs_http import REPLY_BYTES_MAX, Client, client
from orchestrator.storage.gcs_replies import (
    Reply,
    batch_replies,
    is_checksum,
    line,
    may_pass,
    of_credentials,
    parse_error,
    rejection,
)
from orchestrator.storage.port import Created, Entry, Exists, Gone, Patience

Value = TypeVar("Value")

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_BATCH = 100  # deletes in one request, the most that the service takes
_GONE_TRIES = 3
_THREADS = 16
_DAMAGED_TRIES = 3
_NO_BATCHES = frozenset({404, 405, 501})  # what servers answer that have none


class GcsStorage:
    """A run's prefix in a bucket. Creating the object touches nothing. Methods may be called from any thread."""

    def __init__(self, url: str, sender: Client | None = None, patience: Patience | None = None) -> None:
        """Raises UsageError for anything but `gs://bucket/prefix`."""
        found = re.fullmatch(r"gs://([^/]+)/(.+?)/*", url)
        if not found or not _BUCKET.fullmatch(found[1]):
            raise UsageError(f"{url}: expected gs://BUCKET/PREFIX, a run has a prefix of its own{_url_hint(url)}")
        try:
            self._prefix = check_key(found[2], url) + "/"
        except UnsafeKey:
            raise UsageError(f"{url}: the prefix has empty, '.' or '..' parts") from None
        self._bucket = found[1]
        self.url = f"gs://{self._bucket}/{found[2]}"
        self._client = sender or client(patience)
        self._objects = f"/storage/v1/b/{self._bucket}/o"
        self._batches = True  # until a server says that it has none

    def create(self, key: str, body: bytes) -> Created | Exists:
        where = f"{self.url}/{check_key(key, self.url)}"
        boundary = uuid.uuid4().hex
        about = {"name": self._prefix + key, "crc32c": _base64(crc32c.crc32c(body))}
        parts = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(about)}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        )
        gone = damaged = 0
        while True:
            try:
                reply = self._client.send(
                    "create",
                    where,
                    "POST",
                    f"/upload{self._objects}",
                    params={"uploadType": "multipart", "ifGenerationMatch": "0"},
                    headers={"Content-Type": f"multipart/related; boundary={boundary}"},
                    body=parts.encode() + body + f"\r\n--{boundary}--".encode(),
                )
            except Unavailable as error:
                return self._read_back(key, body, error)
            if reply.status == 200:
                return Created()
            if is_checksum(reply):
                damaged += 1
                if damaged == _DAMAGED_TRIES:
                    rejected = self._rejection("create", where, reply)
                    raise StorageError(f"{rejected}; so {damaged} times: something on the way damages data")
                self._client.retries["checksum"] += 1
                continue
            if reply.status != 412:
                raise self._rejection("create", where, reply)
            there = self._compare(key, body)
            if there is not None:
                return there
            gone += 1
            if gone == _GONE_TRIES:
                text = f"answered HTTP 412 {parse_error(reply.body).message!r}, though no such object is there"
                raise StorageError(f"create {where}: {text}, {gone} times")

    def _compare(self, key: str, body: bytes) -> Created | Exists | None:
        """Whose object is under the key: ours, if an earlier try landed and its reply was lost. None if it is gone."""
        try:
            there = self.get(key, max(len(body), RECORD_BYTES_MAX))
        except StorageError as error:
            raise OutcomeUnknown(f"create {self.url}/{key}: cannot be read back ({error})") from error
        if there is None:
            return None
        return Created() if there == body else Exists(there)

    def _read_back(self, key: str, body: bytes, error: Unavailable) -> Created | Exists:
        """After a create without an answer: an object not there may still come, unless all tries were rejected."""
        if not error.landed:
            raise error
        try:
            there = self._compare(key, body)
        except OutcomeUnknown as unread:
            raise OutcomeUnknown(f"{error}; it may have been carried out: {unread}") from error
        if there is None:
            raise OutcomeUnknown(f"{error}; it may have been carried out, or be yet") from error
        return there

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        where = f"{self.url}/{check_key(key, self.url)}"
        for _ in range(_DAMAGED_TRIES):
            reply = self._client.send(
                "get", where, "GET", self.path(key), params={"alt": "media"}, most_bytes=most_bytes
            )
            if reply.status == 404:
                self._check_bucket("get", where, reply)
                return None
            if reply.status != 200:
                raise self._rejection("get", where, reply)
            hashed = re.search(r"crc32c=([^,\s]+)", reply.headers.get("x-goog-hash", ""))
            if hashed is None or hashed[1] == _base64(crc32c.crc32c(reply.body)):
                return reply.body
            self._client.retries["checksum"] += 1
        raise StorageError(f"get {where}: arrived with a wrong crc32c {_DAMAGED_TRIES} times; the network damages data")

    def read_into(self, key: str, offset: int, view: memoryview) -> int:
        return _read_part(self, key, offset, view)

    def _check_bucket(self, operation: str, where: str, reply: Reply) -> None:
        """A bucket that is not there must not look like an object that is not there."""
        if b"bucket does not exist" in reply.body:
            raise self._rejection(operation, where, reply)

    def _rejection(self, operation: str, where: str, reply: Reply) -> StorageError:
        rejected = rejection(operation, where, reply, self._client.credentials.name)
        if of_credentials(operation, reply):
            emit(CredentialsRejected(self._client.credentials.name, str(rejected)[:300]))
        return rejected

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        where = f"{self.url}/{prefix}"
        params = {"prefix": self._prefix + prefix, "fields": "items(name,size),nextPageToken", "maxResults": "1000"}
        if start > prefix:
            params["startOffset"] = self._prefix + start
        while True:
            reply = self._client.send("list", where, "GET", self._objects, params=params)
            if reply.status != 200:
                raise self._rejection("list", where, reply)
            page = _document(reply, f"list {where}")
            for item in page.get("items", ()):
                key = str(item["name"]).removeprefix(self._prefix)
                if _plain(key) and key >= start:
                    yield Entry(key, int(item.get("size", 0)))
            if "nextPageToken" not in page:
                return
            params["pageToken"] = page["nextPageToken"]

    def delete(self, key: str) -> bool:
        where = f"{self.url}/{check_key(key, self.url)}"
        reply = self._client.send("delete", where, "DELETE", self.path(key))
        if reply.status == 404:
            self._check_bucket("delete", where, reply)
            return reply.repeated  # then it was our own earlier try, or somebody who was as fast
        if reply.status not in (200, 204):
            raise self._rejection("delete", where, reply)
        return True

    def delete_many(self, keys: Sequence[str]) -> Iterator[tuple[str, StorageError | None]]:
        """Delete, 100 to a request, one request at a time; where the server has no batches, several objects at a time.
        Yields each key, with what kept it from being deleted."""
        for first in range(0, len(keys), _BATCH):
            chosen = keys[first : first + _BATCH]
            yield from self._delete_batch(chosen)

    def _delete_batch(self, keys: Sequence[str]) -> Iterator[tuple[str, StorageError | None]]:
        boundary = uuid.uuid4().hex
        calls = "".join(
            f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: <{index}>\r\n\r\n"
            f"DELETE {self.path(check_key(key, self.url))}{self._client.query} HTTP/1.1\r\n\r\n\r\n"
            for index, key in enumerate(keys)
        )
        where = f"{len(keys)} objects of {self.url}"
        answers: dict[int, Reply] = {}
        with contextlib.suppress(Unavailable):  # then each by itself, with an answer of its own
            if self._batches:
                reply = self._client.send(
                    "delete",
                    where,
                    "POST",
                    "/batch/storage/v1",
                    headers={"Content-Type": f"multipart/mixed; boundary={boundary}"},
                    body=f"{calls}--{boundary}--\r\n".encode(),
                )
                self._batches = reply.status not in _NO_BATCHES
                answers = batch_replies(reply) if reply.status == 200 else {}
        errors: dict[str, StorageError | None] = {}
        left: list[str] = []
        for index, key in enumerate(keys):
            answer = answers.get(index)
            # What a batch did not do has the patience of a single delete; so has a token that has just ended.
            if answer is None or may_pass(answer) or answer.status == 401:
                left.append(key)
            elif answer.status in (200, 204, 404):
                errors[key] = None
            else:
                errors[key] = self._rejection("delete", f"{self.url}/{key}", answer)
        errors.update(_at_once(self._delete_one, left))
        for key in keys:
            yield key, errors[key]

    def _delete_one(self, key: str) -> tuple[str, StorageError | None]:
        try:
            self.delete(key)
        except StorageError as error:
            return key, error
        return key, None

    def make_durable(self, keys: Iterable[str], known: Mapping[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
        listed = list(keys)
        durable = _at_once(self._make_durable, listed)
        for entry in durable:
            counted = (known or {}).get(entry.path)
            if counted is not None and (counted.bytes, counted.crc32c) != (entry.bytes, entry.crc32c):
                raise StorageError(
                    f"make durable {self.url}/{entry.path}: the store has {entry.bytes} bytes "
                    f"with crc32c {entry.crc32c}, {counted.bytes} with {counted.crc32c} were written; it is not used"
                )
        # The store knows no CRC-32; who wrote the object may.
        return tuple(replace((known or {}).get(entry.path, entry), path=entry.path) for entry in durable)

    def _make_durable(self, key: str) -> FileEntry:
        found = self.measure(key)
        if found is None:
            raise StorageError(f"stat {self.url}/{key}: no such object")
        return found

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        where = f"{self.url}/{check_key(key, self.url)}"
        reply = self._client.send("stat", where, "GET", self.path(key), params={"fields": "size,crc32c"})
        if reply.status == 404:
            self._check_bucket("stat", where, reply)
            return None
        if reply.status != 200:
            raise self._rejection("stat", where, reply)
        found = _document(reply, f"stat {where}")
        try:
            crc = base64.b64decode(found["crc32c"]).hex()
            return FileEntry(path=key, bytes=int(found.get("size", 0)), crc32c=crc)
        except (KeyError, ValueError, TypeError) as error:
            raise Unavailable(f"stat {where}: answered without a size or CRC-32C: {_quoted(reply)}") from error

    def ask(
        self,
        operation: str,
        key: str,
        method: str,
        *,
        path: str = "",
        params: Mapping[str, str],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        most_bytes: int = REPLY_BYTES_MAX,
        passing: tuple[int, ...] = (),
    ) -> Reply:
        """The answer to a request about the object under `key`, at `path` or its own. Raises StorageError for one that
        rejects it, but for what is `passing`."""
        where = f"{self.url}/{check_key(key, self.url)}"
        more: dict[str, Any] = {"params": params, "headers": headers, "body": body, "most_bytes": most_bytes}
        reply = self._client.send(operation, where, method, path or self.path(key), **more)
        if reply.status not in (200, 206, *passing):
            raise self._rejection(operation, where, reply)
        return reply

    def path(self, key: str) -> str:
        """Of the object, at the service."""
        return f"{self._objects}/{quote(self._prefix + key, safe='')}"


def _base64(checksum: int) -> str:
    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def _plain(key: str) -> bool:
    try:
        check_key(key, "")
    except UnsafeKey:
        return False
    return True


def _at_once(call: Callable[[str], Value], keys: Sequence[str]) -> tuple[Value, ...]:
    """`call` of each, in order, several at a time."""
    if len(keys) <= 1:
        return tuple(map(call, keys))
    with ThreadPoolExecutor(min(_THREADS, len(keys)), thread_name_prefix="gcs") as pool:
        return tuple(pool.map(call, keys))


def _url_hint(url: str) -> str:
    """What may have been meant by a URL that names no prefix in a bucket."""
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    if not bucket:
        return "; the bucket's name is missing after gs://"
    if not prefix.strip("/"):
        return f", as {url.rstrip('/')}/run7"
    if _BUCKET.fullmatch(bucket.lower()):
        return f"; buckets have names in small letters: gs://{bucket.lower()}/{prefix}"
    return f"; {bucket!r} can be no bucket's name"


def _quoted(reply: Reply) -> str:
    return repr(line(reply.body[:1000].decode("utf-8", "replace"), 200))


def _document(reply: Reply, what: str) -> dict[str, Any]:
    """The JSON object of an answer. A proxy may answer 200 with a page of its own: Unavailable."""
    try:
        found = json.loads(reply.body)
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise Unavailable(f"{what}: answered {reply.status} with something that is no JSON object: {_quoted(reply)}")


def _read_part(storage: GcsStorage, key: str, offset: int, view: memoryview) -> int:
    """As `ReadsParts.read_into`; what has arrived is for the caller to check. Raises Gone, StorageError."""
    reply = storage.ask(
        "get",
        key,
        "GET",
        params={"alt": "media"},
        headers={"Range": f"bytes={offset}-{offset + len(view) - 1}"},
        passing=(404, 416),
        most_bytes=len(view),
    )
    if reply.status == 404:
        raise Gone(f"get {storage.url}/{key}: there is no such object")
    if reply.status == 416:  # begins at its end, or after it
        return 0
    view[: len(reply.body)] = reply.body
    return len(reply.body)

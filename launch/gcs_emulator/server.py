"""The emulator's HTTP side: the JSON API as gcsfs, TensorStore and this package speak it.

Buckets: get, create. Objects: list, metadata, media with Range, media, multipart and resumable upload, delete, patch,
rewriteTo, copyTo, moveTo, batch; and media as `/BUCKET/NAME`, as the XML API has it. `/_emulator/faults` (GET, PUT),
`/_emulator/rules/GROUP` (GET, PUT), `/_emulator/guards/BUCKET` (PUT), `/_emulator/counts` (GET, DELETE) and
`/_emulator/requests` (GET; DELETE of the counts clears it) are its own.
"""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from aiohttp import web

from launch.gcs_emulator.bucket import LIST_PAGE_MAX, Bucket, Object, Preconditions, Rejected
from launch.gcs_emulator.faults import Dice, Faults, Rule, Rules
from launch.gcs_emulator.guard import Guard
from launch.gcs_emulator.replies import Answer, altered, cut, hang_up, response, stay_silent, trickle
from launch.gcs_emulator.request_log import Logged, RequestLog

BODY_BYTES_MAX = 1 << 30
UPLOADS_MAX = 10_000
BATCH_MAX = 100  # calls in one batch request, as the service documents
# What the service charges for: class A (writes and listings), class B (reads), free (deletes).
CLASS_OF = {"insert": "A", "list": "A", "patch": "A", "copy": "A", "get": "B", "media": "B", "delete": "free"}
_OBJECT = re.compile(r"/(?:storage/v1|download/storage/v1)/b/([^/]+)/o/([^/]+)")
_COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)")
_LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
_UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
_PLAIN = re.compile(r"/((?!storage/|upload/|download/|resumable/|batch|_emulator/)[^/]+)/(.+)")  # the XML API's objects


MEDIA = {"alt": "media"}
_ABOUT_MAX = 8192  # bytes of a multipart upload in which its metadata is


@dataclass
class Upload:
    """A resumable upload: the conditions are those of its initiation."""

    bucket: str
    name: str
    conditions: Preconditions
    content_type: str
    metadata: dict[str, str]
    crc32c: str | None
    body: bytearray = field(default_factory=bytearray)
    made: dict[str, Any] | None = None


def _json(value: Any, operation: str, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"}, operation)


def _rejection(rejected: Rejected, operation: str = "other") -> Answer:
    if rejected.status == 304:
        return Answer(304, operation=operation)
    cause = {"message": str(rejected), **({"reason": rejected.reason} if rejected.reason else {})}
    error = {"error": {"code": rejected.status, "message": str(rejected), "errors": [cause]}}
    return _json(error, operation, rejected.status)


class Emulator:
    """All state, and one handler for every request."""

    def __init__(self, buckets: tuple[str, ...], faults: Faults, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buckets = {name: Bucket(name, max_bytes) for name in buckets}
        self._uploads: dict[str, Upload] = {}
        self.dice = Dice(faults)
        self.rules = Rules()
        self.guards: dict[str, Guard] = {}
        self.counts: Counter[str] = Counter()
        self.log = RequestLog()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if path.startswith("/_emulator/"):
            return await self._control(request, path)
        with self.log.noted(*_named(request.method, path, request.query)) as logged:
            return await self._handled(request, path, logged)

    async def _handled(self, request: web.Request, path: str, logged: Logged) -> web.StreamResponse:
        if self.dice.faults.down:
            self.dice.counts["down"] += 1
            return hang_up(request)
        if self.dice.hit("slow"):
            await asyncio.sleep(self.dice.faults.slow_s)
        for kind, status in (("too_many", 429), ("unavailable", 503)):
            if self.dice.hit(kind):
                return response(_rejection(Rejected(status, f"injected {status}")))
        body = await request.read()
        logged.operation, logged.name = _named(request.method, path, request.query, body)
        if rule := self.rules.hit(logged.operation, logged.name):
            return await self._ruled(rule, request, path, body)
        if request.method != "GET" and self.dice.hit("cut"):
            self._keep_half(request, body)
            return hang_up(request)
        answer = self._answer(request, path, dict(request.query), body)
        if self.dice.hit("lost"):
            return hang_up(request)
        if request.method == "GET" and len(answer.body) > 1 and self.dice.hit("cut"):
            return await cut(request, answer, len(answer.body) // 2)
        return response(answer)

    async def _ruled(self, rule: Rule, request: web.Request, path: str, body: bytes) -> web.StreamResponse:
        """The answer that `rule` has for this request."""
        if rule.kind == "status":
            status = int(rule.value)
            message = rule.message or f"injected {status} for {path}"
            answer = _rejection(Rejected(status, message, rule.reason))
            more = {"Retry-After": rule.retry_after} if rule.retry_after else {}
            return response(replace(answer, headers={**answer.headers, **more}))
        if rule.kind == "hang":
            return await stay_silent(request)
        if rule.kind == "type":
            return web.Response(text="<html><body>Please log in.</body></html>", content_type="text/html")
        if rule.kind == "slow":
            await asyncio.sleep(rule.value)
        answer = self._answer(request, path, dict(request.query), body)
        if rule.kind == "cut":
            return await cut(request, answer, int(rule.value))
        if rule.kind == "trickle":
            return await trickle(request, answer, rule.value)
        return response(altered(rule, answer))

    def _answer(self, request: web.Request, path: str, query: dict[str, str], body: bytes) -> Answer:
        base = f"{request.scheme}://{request.host}"
        if path.startswith("/batch"):
            return self._batch(request.headers, body)
        return self.call(request.method, path, query, request.headers, body, base)

    def call(
        self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        """One call of the API, carried out at once. Counted by operation and by class."""
        try:
            self._check_guard(path, query, headers)
            if self.dice.faults.read_only and method != "GET":
                raise Rejected(403, "the caller does not have storage.objects.create or delete access")
            answer = self._route(method, path, query, headers, body, base)
        except Rejected as rejected:
            answer = _rejection(rejected, _operation(method, path, query))
        except ValueError as error:
            answer = _rejection(Rejected(400, f"invalid request: {error}"), _operation(method, path, query))
        self.counts[answer.operation] += 1
        return answer

    def _route(
        self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        if found := _UPLOAD.fullmatch(path):
            return self._upload(unquote(found[1]), query, headers, body, base)
        if found := _COPY.fullmatch(path):
            return self._copy(*(unquote(part or "") for part in found.groups()), query=query)
        if found := _OBJECT.fullmatch(path):
            return self._object(method, self._bucket(unquote(found[1])), unquote(found[2]), query, headers, body)
        if found := _LIST.fullmatch(path):
            return self._list(self._bucket(unquote(found[1])), query)
        if path == "/storage/v1/b" and method == "POST":
            name = str(json.loads(body)["name"])
            if name in self._buckets:
                raise Rejected(409, f"bucket {name} exists")
            self._buckets[name] = Bucket(name, self._max_bytes)
            return _json(_bucket_resource(name), "bucket")
        if path == "/storage/v1/b":
            return _json(
                {"kind": "storage#buckets", "items": [_bucket_resource(name) for name in self._buckets]}, "bucket"
            )
        if found := _BUCKET.fullmatch(path):
            return _json(_bucket_resource(self._bucket(unquote(found[1])).name), "bucket")
        if method == "GET" and (found := _PLAIN.fullmatch(path)):
            return self._object(method, self._bucket(unquote(found[1])), unquote(found[2]), MEDIA, headers, body)
        raise Rejected(404, f"not a path of the JSON API: {method} {path}")

    def _check_guard(self, path: str, query: Mapping[str, str], headers: Mapping[str, str]) -> None:
        found = _PLAIN.fullmatch(path) or re.match(r"/(?:\w+/)*storage/v1/b/([^/?]+)", path)
        if found and found[1] in self.guards:
            self.guards[found[1]].check(query, headers)

    def _bucket(self, name: str) -> Bucket:
        if name not in self._buckets:
            raise Rejected(404, f"The specified bucket does not exist: {name}")
        return self._buckets[name]

    def _object(
        self,
        method: str,
        bucket: Bucket,
        name: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes,
    ) -> Answer:
        conditions = Preconditions.of(query)
        if method == "DELETE":
            bucket.delete(name, conditions, query.get("generation"))
            return Answer(204, operation="delete")
        if method == "PATCH":
            changed = bucket.patch(name, conditions, json.loads(body).get("metadata", {}))
            return _json(changed.resource(bucket.name), "patch")
        found = bucket.find(name, query.get("generation"))
        conditions.check(found, reading=True)
        if query.get("alt") != "media":
            return _json(found.resource(bucket.name), "get")
        return _media(found, headers.get("Range"))

    def _list(self, bucket: Bucket, query: Mapping[str, str]) -> Answer:
        page = bucket.list(
            query.get("prefix", ""),
            query.get("startOffset", ""),
            query.get("endOffset", ""),
            query.get("delimiter", ""),
            int(query.get("maxResults", LIST_PAGE_MAX)),
            query.get("pageToken"),
        )
        told: dict[str, Any] = {"kind": "storage#objects"}
        told |= {"items": [one.resource(bucket.name) for one in page.objects]} if page.objects else {}
        told |= {"prefixes": list(page.prefixes)} if page.prefixes else {}
        told |= {"nextPageToken": page.next_token} if page.next_token else {}
        return _json(told, "list")

    def _copy(self, source: str, name: str, how: str, target: str, to: str, *, query: Mapping[str, str]) -> Answer:
        bucket, goal = self._bucket(source), self._bucket(target or source)
        found = bucket.find(name, query.get("sourceGeneration"))
        Preconditions.of(query, "Source").check(found)
        made = goal.put(to, found.body, Preconditions.of(query), found.content_type, found.metadata)
        if how == "moveTo":
            bucket.delete(name, Preconditions())
        resource = made.resource(goal.name)
        if how != "rewriteTo":
            return _json(resource, "copy")
        size = resource["size"]
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return _json({**done, "resource": resource}, "copy")

    # Uploads.

    def _upload(
        self, bucket: str, query: Mapping[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        place = self._bucket(bucket)
        if "upload_id" in query:
            return self._continue(query["upload_id"], headers, body)
        conditions = Preconditions.of(query)
        kind = query.get("uploadType")
        given = _hash_header(headers)
        if kind == "media":
            sort = headers.get("Content-Type", "application/octet-stream")
            made = place.put(query["name"], body, conditions, sort, None, given)
            return _json(made.resource(bucket), "insert")
        if kind == "multipart":
            about, content_type, data = _multipart(headers["Content-Type"], body)
            name = about.get("name") or query["name"]
            checksum = about.get("crc32c") or given
            made = place.put(name, data, conditions, content_type, about.get("metadata"), checksum)
            return _json(made.resource(bucket), "insert")
        if kind != "resumable":
            raise Rejected(400, f"uploadType={kind}")
        about = json.loads(body) if body else {}
        name = about.get("name") or query["name"]
        conditions.check(place.peek(name))
        if len(self._uploads) >= UPLOADS_MAX:
            raise Rejected(429, "too many resumable uploads under way")
        upload_id = uuid.uuid4().hex
        sort = headers.get("X-Upload-Content-Type", "application/octet-stream")
        metadata, checksum = about.get("metadata", {}), about.get("crc32c") or given
        self._uploads[upload_id] = Upload(bucket, name, conditions, sort, metadata, checksum)
        where = f"{base}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload_id}"
        return Answer(200, b"", {"Location": where, "X-GUploader-UploadID": upload_id}, "initiate")

    def _continue(self, upload_id: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Bytes of a resumable upload, or a question how far it is. Bytes that are there already are passed over."""
        upload = self._uploads.get(upload_id)
        if upload is None:
            raise Rejected(404, "no such upload")
        if upload.made is not None:  # finished; its reply may have been lost
            return _json(upload.made, "chunk")
        total = self._append(upload, headers, body)
        if total is None or len(upload.body) < total:
            last = len(upload.body) - 1
            return Answer(308, b"", {"Range": f"bytes=0-{last}"} if last >= 0 else {}, "chunk")
        made = self._bucket(upload.bucket).put(
            upload.name, bytes(upload.body), upload.conditions, upload.content_type, upload.metadata, upload.crc32c
        )
        upload.made = made.resource(upload.bucket)
        upload.body.clear()
        return _json(upload.made, "insert")

    def _append(self, upload: Upload, headers: Mapping[str, str], body: bytes) -> int | None:
        """Take what is new of `body`. Returns the whole length, if it is known."""
        told = headers.get("Content-Range")
        if told is None:
            upload.body[:] = body
            return len(body)
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", told)
        if not found:
            raise Rejected(400, f"Content-Range: {told}")
        if found[1] is not None:
            first = int(found[1])
            if first > len(upload.body):
                raise Rejected(503, f"there are {len(upload.body)} bytes, the chunk begins at {first}")
            upload.body += body[len(upload.body) - first :]
        return None if found[3] == "*" else int(found[3])

    def _keep_half(self, request: web.Request, body: bytes) -> None:
        """An upload that is cut: of a resumable one, half of the chunk has arrived."""
        upload = self._uploads.get(request.query.get("upload_id", ""))
        if upload and upload.made is None and body and "Content-Range" in request.headers:
            self._append(upload, request.headers, body[: len(body) // 2])

    # Batches and control.

    def _batch(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Up to 100 calls in one request; each has a status of its own, and meets 429 and 503 by itself."""
        found = re.search(r'boundary="?([^";]+)"?', headers.get("Content-Type", ""))
        if not found:
            return _rejection(Rejected(400, "a batch without a boundary"))
        parts = [part for part in body.split(b"--" + found[1].encode()) if b"HTTP/1.1" in part]
        if len(parts) > BATCH_MAX:
            return _rejection(Rejected(400, f"{len(parts)} calls in one batch; at most {BATCH_MAX}"))
        self.counts["batch"] += 1
        told = []
        for part in parts:
            text = part.decode()
            content_id = re.search(r"(?im)^content-id:\s*<?([^>\r\n]*)>?", text)
            line = re.search(r"(?m)^(\w+) (\S+) HTTP/1\.1", text)
            assert line
            answer = self._in_batch(line[1], line[2], headers)
            name = content_id[1] if content_id else ""
            told.append(
                f"--batch_reply\r\nContent-Type: application/http\r\nContent-ID: <response-{name}>\r\n\r\n"
                f"HTTP/1.1 {answer.status} X\r\nContent-Length: {len(answer.body)}\r\n\r\n{answer.body.decode()}\r\n"
            )
        reply = "".join(told) + "--batch_reply--\r\n"
        return Answer(200, reply.encode(), {"Content-Type": "multipart/mixed; boundary=batch_reply"}, "batch")

    def _in_batch(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        for kind, status in (("too_many", 429), ("unavailable", 503)):
            if self.dice.hit(kind):
                return _rejection(Rejected(status, f"injected {status}"))
        url = urlsplit(target)
        query = dict(parse_qsl(url.query))
        rule = self.rules.hit(*_named(method, url.path, query))
        if rule and rule.kind == "status":
            return _rejection(Rejected(int(rule.value), rule.message or f"injected {rule.value:g}", rule.reason))
        own = {name: value for name, value in headers.items() if name.lower() == "authorization"}
        return self.call(method, url.path, query, own, b"", "")

    async def _control(self, request: web.Request, path: str) -> web.Response:
        if path == "/_emulator/faults":
            if request.method == "PUT":
                try:
                    self.dice.set(Faults.of(await request.json()))
                except (ValueError, TypeError) as error:
                    return web.json_response({"error": str(error)}, status=400)
            return web.json_response(vars(self.dice.faults))
        if path.startswith("/_emulator/rules/"):
            group = path.removeprefix("/_emulator/rules/")
            if request.method == "PUT":
                try:
                    self.rules.set(group, [Rule.of(one) for one in await request.json()])
                except (ValueError, TypeError, re.error) as error:
                    return web.json_response({"error": str(error)}, status=400)
            return web.json_response({"hits": self.rules.counts[group]})
        if path == "/_emulator/requests":
            return web.json_response(self.log.told())
        if path.startswith("/_emulator/guards/") and request.method == "PUT":
            try:
                guard = Guard.of(await request.json())
            except (ValueError, TypeError) as error:
                return web.json_response({"error": str(error)}, status=400)
            self.guards[path.removeprefix("/_emulator/guards/")] = guard
            return web.json_response({})
        if path == "/_emulator/counts":
            told = self._told()
            if request.method == "DELETE":
                self.counts.clear()
                self.log.clear()
                self.dice.counts.clear()
                for bucket in self._buckets.values():
                    bucket.rewritten_too_soon = 0
            return web.json_response(told)
        return web.json_response(
            {"error": "choose from /_emulator/: faults, rules/GROUP, guards/BUCKET, counts, requests"}, status=404
        )

    def _told(self) -> dict[str, Any]:
        classes: Counter[str] = Counter()
        for operation, count in self.counts.items():
            if operation in CLASS_OF:
                classes[CLASS_OF[operation]] += count
        return {
            "operations": dict(self.counts),
            "classes": dict(classes),
            "faults": dict(self.dice.counts),
            "bytes": sum(bucket.bytes for bucket in self._buckets.values()),
            "rewritten_too_soon": sum(bucket.rewritten_too_soon for bucket in self._buckets.values()),
        }


def _bucket_resource(name: str) -> dict[str, str]:
    return {"kind": "storage#bucket", "id": name, "name": name, "location": "EMULATOR", "storageClass": "STANDARD"}


def _operation(method: str, path: str, query: Mapping[str, str]) -> str:
    """Which operation a rejected call was; rejections are charged for, too."""
    if _UPLOAD.fullmatch(path):
        return "insert"
    if _OBJECT.fullmatch(path):
        return {"DELETE": "delete", "PATCH": "patch"}.get(method, "media" if query.get("alt") == "media" else "get")
    if _LIST.fullmatch(path) or _COPY.fullmatch(path):
        return "list" if _LIST.fullmatch(path) else "copy"
    return "media" if method == "GET" and _PLAIN.fullmatch(path) else "other"


def _named(method: str, path: str, query: Mapping[str, str], body: bytes = b"") -> tuple[str, str]:
    """Which operation a call is, and the object's name or the listing's prefix."""
    found = _OBJECT.fullmatch(path) or _PLAIN.fullmatch(path)
    name = unquote(found[2]) if found else query.get("prefix", query.get("name", ""))
    if not name and _UPLOAD.fullmatch(path):
        told = re.search(rb'"name":\s*"([^"]*)"', body[:_ABOUT_MAX])
        name = told[1].decode(errors="replace") if told else ""
    return _operation(method, path, query), name


def _hash_header(headers: Mapping[str, str]) -> str | None:
    found = re.search(r"crc32c=([^,\s]+)", headers.get("x-goog-hash", ""))
    return found[1] if found else None


def _media(found: Object, wanted: str | None) -> Answer:
    """The bytes, or a range of them: `bytes=a-b`, `bytes=a-`, `bytes=-n`."""
    size = len(found.body)
    headers = {
        "Content-Type": found.content_type,
        "x-goog-generation": str(found.generation),
        "x-goog-metageneration": str(found.metageneration),
        "x-goog-hash": "crc32c=" + found.resource("")["crc32c"],
        "x-goog-stored-content-length": str(size),
        "ETag": f'"{found.generation}"',
    }
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not match or (not match[1] and not match[2]):
        return Answer(200, found.body, headers, "media")
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first >= size or first > last:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"}, "media")
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(206, found.body[first : last + 1], headers, "media")


def _multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """(metadata, content type of the data, data) of a multipart/related body, with CRLF or LF line ends."""
    found = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', content_type)
    if not found:
        raise Rejected(400, "a multipart upload without a boundary")
    boundary = b"--" + (found[1] or found[2]).encode()
    parts = body.split(boundary, 2)
    end = body.rfind(boundary)
    if len(parts) < 3:
        raise Rejected(400, "a multipart upload needs two parts")
    second = body[len(parts[0]) + len(parts[1]) + 2 * len(boundary) : end]
    _, about = _split_part(parts[1])
    headers, data = _split_part(second)
    sort = re.search(rb"(?im)^content-type:\s*([^\r\n]+)", headers)
    line_end = b"\r\n" if second.startswith(b"\r\n") else b"\n"  # the data may end with a carriage return of its own
    data = data.removesuffix(line_end)
    return json.loads(about), sort[1].decode() if sort else "application/octet-stream", data


def _split_part(part: bytes) -> tuple[bytes, bytes]:
    found = re.search(rb"\r?\n\r?\n", part)
    if not found:
        raise Rejected(400, "a part without an empty line")
    return part[: found.start()], part[found.end() :]

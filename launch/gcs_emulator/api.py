"""The JSON API as gcsfs, TensorStore and this package speak it, carried out on buckets in memory. No I/O.

Buckets: get, create. Objects: list, metadata, media with Range, media, multipart and resumable upload, delete, patch,
rewriteTo, copyTo, moveTo; and media as `/BUCKET/NAME`, as the XML API has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from launch.gcs_emulator import paths
from launch.gcs_emulator.bucket import LIST_PAGE_MAX, ApiError, Bucket, Object, Preconditions
from launch.gcs_emulator.replies import Answer, json_answer
from launch.gcs_emulator.uploads import Uploads

_MEDIA = {"alt": "media"}


class ObjectApi:
    """All buckets, and one method for every call of the API."""

    def __init__(self, buckets: tuple[str, ...], max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.buckets = {name: Bucket(name, max_bytes) for name in buckets}
        self.uploads = Uploads()

    def call(
        self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        """One call, carried out at once. `base`: where the emulator is. Raises ApiError, ValueError."""
        if found := paths.UPLOAD.fullmatch(path):
            return self.uploads.upload(self._bucket(unquote(found[1])), query, headers, body, base)
        if found := paths.COPY.fullmatch(path):
            return self._copy(*(unquote(part or "") for part in found.groups()), query=query)
        if found := paths.OBJECT.fullmatch(path):
            return self._object(method, self._bucket(unquote(found[1])), unquote(found[2]), query, headers, body)
        if found := paths.LIST.fullmatch(path):
            return self._list(self._bucket(unquote(found[1])), query)
        if path == "/storage/v1/b" and method == "POST":
            name = str(json.loads(body)["name"])
            if name in self.buckets:
                raise ApiError(409, f"bucket {name} exists")
            self.buckets[name] = Bucket(name, self._max_bytes)
            return json_answer(_bucket_resource(name), "bucket")
        if path == "/storage/v1/b":
            return json_answer(
                {"kind": "storage#buckets", "items": [_bucket_resource(name) for name in self.buckets]}, "bucket"
            )
        if found := paths.BUCKET.fullmatch(path):
            return json_answer(_bucket_resource(self._bucket(unquote(found[1])).name), "bucket")
        if method == "GET" and (found := paths.PLAIN.fullmatch(path)):
            return self._object(method, self._bucket(unquote(found[1])), unquote(found[2]), _MEDIA, headers, body)
        raise ApiError(404, f"not a path of the JSON API: {method} {path}")

    def _bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise ApiError(404, f"The specified bucket does not exist: {name}")
        return self.buckets[name]

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
            return json_answer(changed.resource(bucket.name), "patch")
        found = bucket.find(name, query.get("generation"))
        conditions.check(found, reading=True)
        if query.get("alt") != "media":
            return json_answer(found.resource(bucket.name), "get")
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
        listed: dict[str, Any] = {"kind": "storage#objects"}
        listed |= {"items": [one.resource(bucket.name) for one in page.objects]} if page.objects else {}
        listed |= {"prefixes": list(page.prefixes)} if page.prefixes else {}
        listed |= {"nextPageToken": page.next_token} if page.next_token else {}
        return json_answer(listed, "list")

    def _copy(self, source: str, name: str, how: str, target: str, to: str, *, query: Mapping[str, str]) -> Answer:
        bucket, goal = self._bucket(source), self._bucket(target or source)
        found = bucket.find(name, query.get("sourceGeneration"))
        Preconditions.of(query, "Source").check(found)
        made = goal.put(to, found.body, Preconditions.of(query), found.content_type, found.metadata)
        if how == "moveTo":
            bucket.delete(name, Preconditions())
        resource = made.resource(goal.name)
        if how != "rewriteTo":
            return json_answer(resource, "copy")
        size = resource["size"]
        done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
        return json_answer({**done, "resource": resource}, "copy")


def _bucket_resource(name: str) -> dict[str, str]:
    return {"kind": "storage#bucket", "id": name, "name": name, "location": "EMULATOR", "storageClass": "STANDARD"}


def _media(found: Object, byte_range: str | None) -> Answer:
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
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", byte_range or "")
    if not match or (not match[1] and not match[2]):
        return Answer(200, found.body, headers, "media")
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first >= size or first > last:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"}, "media")
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(206, found.body[first : last + 1], headers, "media")

"""Uploads, in each of the three ways that the service knows: media, multipart and resumable."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.gcs_emulator.bucket import ApiError, Bucket, Preconditions
from launch.gcs_emulator.replies import Answer, json_answer

RESUMABLE_MAX = 10_000
_ANY_TYPE = "application/octet-stream"


@dataclass
class ResumableUpload:
    """The conditions are those of its initiation. `made`: the object, once all bytes are there."""

    bucket: Bucket
    name: str
    conditions: Preconditions
    content_type: str
    metadata: dict[str, str]
    crc32c: str | None
    body: bytearray = field(default_factory=bytearray)
    made: dict[str, Any] | None = None

    def append(self, headers: Mapping[str, str], body: bytes) -> int | None:
        """Take what is new of `body`. Returns the whole length, if it is known. Raises ApiError."""
        given = headers.get("Content-Range")
        if given is None:
            self.body[:] = body
            return len(body)
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", given)
        if not found:
            raise ApiError(400, f"Content-Range: {given}")
        if found[1] is not None:
            first = int(found[1])
            if first > len(self.body):
                raise ApiError(503, f"there are {len(self.body)} bytes, the chunk begins at {first}")
            self.body += body[len(self.body) - first :]
        return None if found[3] == "*" else int(found[3])

    def finish(self) -> dict[str, Any]:
        made = self.bucket.put(
            self.name, bytes(self.body), self.conditions, self.content_type, self.metadata, self.crc32c
        )
        self.made = made.resource(self.bucket.name)
        self.body.clear()
        return self.made


class Uploads:
    """All resumable uploads of the emulator, and the two ways that need no state."""

    def __init__(self) -> None:
        self._resumable: dict[str, ResumableUpload] = {}

    def upload(
        self, bucket: Bucket, query: Mapping[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        """One request of an upload. `base`: where the client may send the next one. Raises ApiError."""
        if "upload_id" in query:
            return self._continue(query["upload_id"], headers, body)
        kind = query.get("uploadType")
        if kind == "resumable":
            return self._initiate(bucket, query, headers, body, base)
        conditions, checksum = Preconditions.of(query), _hash_header(headers)
        if kind == "media":
            content_type = headers.get("Content-Type", _ANY_TYPE)
            made = bucket.put(query["name"], body, conditions, content_type, None, checksum)
        elif kind == "multipart":
            about, content_type, data = _multipart(headers["Content-Type"], body)
            name, checksum = about.get("name") or query["name"], about.get("crc32c") or checksum
            made = bucket.put(name, data, conditions, content_type, about.get("metadata"), checksum)
        else:
            raise ApiError(400, f"uploadType={kind}")
        return json_answer(made.resource(bucket.name), "insert")

    def _initiate(
        self, bucket: Bucket, query: Mapping[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        about = json.loads(body) if body else {}
        name, conditions = about.get("name") or query["name"], Preconditions.of(query)
        conditions.check(bucket.peek(name))
        if len(self._resumable) >= RESUMABLE_MAX:
            raise ApiError(429, "too many resumable uploads under way")
        upload_id = uuid.uuid4().hex
        content_type = headers.get("X-Upload-Content-Type", _ANY_TYPE)
        checksum = about.get("crc32c") or _hash_header(headers)
        upload = ResumableUpload(bucket, name, conditions, content_type, about.get("metadata", {}), checksum)
        self._resumable[upload_id] = upload
        where = f"{base}/upload/storage/v1/b/{bucket.name}/o?uploadType=resumable&upload_id={upload_id}"
        return Answer(200, b"", {"Location": where, "X-GUploader-UploadID": upload_id}, "initiate")

    def _continue(self, upload_id: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Bytes of a resumable upload, or a question how far it is. Bytes that are there already are passed over."""
        upload = self._resumable.get(upload_id)
        if upload is None:
            raise ApiError(404, "no such upload")
        if upload.made is not None:  # finished; its reply may have been lost
            return json_answer(upload.made, "chunk")
        total = upload.append(headers, body)
        if total is None or len(upload.body) < total:
            last = len(upload.body) - 1
            return Answer(308, b"", {"Range": f"bytes=0-{last}"} if last >= 0 else {}, "chunk")
        return json_answer(upload.finish(), "insert")

    def keep_half(self, upload_id: str, headers: Mapping[str, str], body: bytes) -> None:
        """A request that is cut: of a resumable upload, half of the chunk has arrived."""
        upload = self._resumable.get(upload_id)
        if upload and upload.made is None and body and "Content-Range" in headers:
            upload.append(headers, body[: len(body) // 2])


def _hash_header(headers: Mapping[str, str]) -> str | None:
    found = re.search(r"crc32c=([^,\s]+)", headers.get("x-goog-hash", ""))
    return found[1] if found else None


def _multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], str, bytes]:
    """(metadata, content type of the data, data) of a multipart/related body, with CRLF or LF line ends."""
    found = re.search(r'boundary=(?:"([^"]+)"|([^;\s]+))', content_type)
    if not found:
        raise ApiError(400, "a multipart upload without a boundary")
    boundary = b"--" + (found[1] or found[2]).encode()
    parts = body.split(boundary, 2)
    end = body.rfind(boundary)
    if len(parts) < 3:
        raise ApiError(400, "a multipart upload needs two parts")
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
        raise ApiError(400, "a part without an empty line")
    return part[: found.start()], part[found.end() :]

"""Batch requests: several calls in one request, as multipart/mixed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from launch.gcs_emulator.bucket import ApiError
from launch.gcs_emulator.replies import Answer

CALLS_MAX = 100  # in one batch request, as the service documents


def batch(headers: Mapping[str, str], body: bytes, call: Callable[[str, str], Answer]) -> Answer:
    """The answers of all calls, each `call(method, target)`. Raises ApiError for a batch that is none."""
    found = re.search(r'boundary="?([^";]+)"?', headers.get("Content-Type", ""))
    if not found:
        raise ApiError(400, "a batch without a boundary")
    parts = [part for part in body.split(b"--" + found[1].encode()) if b"HTTP/1.1" in part]
    if len(parts) > CALLS_MAX:
        raise ApiError(400, f"{len(parts)} calls in one batch; at most {CALLS_MAX}")
    replies = []
    for part in parts:
        text = part.decode()
        content_id = re.search(r"(?im)^content-id:\s*<?([^>\r\n]*)>?", text)
        line = re.search(r"(?m)^(\w+) (\S+) HTTP/1\.1", text)
        assert line
        answer = call(line[1], line[2])
        name = content_id[1] if content_id else ""
        replies.append(
            f"--batch_reply\r\nContent-Type: application/http\r\nContent-ID: <response-{name}>\r\n\r\n"
            f"HTTP/1.1 {answer.status} X\r\nContent-Length: {len(answer.body)}\r\n\r\n{answer.body.decode()}\r\n"
        )
    reply = "".join(replies) + "--batch_reply--\r\n"
    return Answer(200, reply.encode(), {"Content-Type": "multipart/mixed; boundary=batch_reply"}, "batch")

"""Which operation of the JSON API a request is, and of which object. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import unquote

OBJECT = re.compile(r"/(?:storage/v1|download/storage/v1)/b/([^/]+)/o/([^/]+)")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)")
LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
PLAIN = re.compile(r"/((?!storage/|upload/|download/|resumable/|batch|_emulator/)[^/]+)/(.+)")  # the XML API's objects
_METADATA_BYTES_MAX = 8192  # of a multipart upload: its metadata is in the first ones


def operation_of(method: str, path: str, query: Mapping[str, str]) -> str:
    """Which operation a rejected call was; rejections are charged for, too."""
    if UPLOAD.fullmatch(path):
        return "insert"
    if OBJECT.fullmatch(path):
        return {"DELETE": "delete", "PATCH": "patch"}.get(method, "media" if query.get("alt") == "media" else "get")
    if LIST.fullmatch(path) or COPY.fullmatch(path):
        return "list" if LIST.fullmatch(path) else "copy"
    return "media" if method == "GET" and PLAIN.fullmatch(path) else "other"


def identify(method: str, path: str, query: Mapping[str, str], body: bytes = b"") -> tuple[str, str]:
    """Which operation a call is, and the name of the object, of a copy the source, or the listing's prefix."""
    found = OBJECT.fullmatch(path) or COPY.fullmatch(path) or PLAIN.fullmatch(path)
    name = unquote(found[2]) if found else query.get("prefix", query.get("name", ""))
    if not name and UPLOAD.fullmatch(path):
        found_name = re.search(rb'"name":\s*"([^"]*)"', body[:_METADATA_BYTES_MAX])
        name = found_name[1].decode(errors="replace") if found_name else ""
    return operation_of(method, path, query), name


def bucket_of(path: str) -> str | None:
    """The bucket that a path is about; None for one that is about none."""
    found = PLAIN.fullmatch(path) or re.match(r"/(?:\w+/)*storage/v1/b/([^/?]+)", path)
    return found[1] if found else None

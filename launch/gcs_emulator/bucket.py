"""The objects of the emulator and the rules of Cloud Storage that they follow. In memory; no I/O, no await.

Every method checks its preconditions and acts without giving up control, so each is atomic, as in the real service:
of any number of concurrent creates with `ifGenerationMatch=0` exactly one succeeds. Reads and listings are never stale.
"""

from __future__ import annotations

import base64
import bisect
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import crc32c

LIST_PAGE_MAX = 1000


class ApiError(Exception):
    """What the service answers instead: an HTTP status, a message, and its own word for the cause."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Preconditions:
    """The conditions of one request; `None` is not asked for. Generation 0 means that there is no object."""

    generation: int | None = None
    not_generation: int | None = None
    metageneration: int | None = None

    @classmethod
    def of(cls, query: Mapping[str, str], suffix: str = "") -> Preconditions:
        def number(name: str) -> int | None:
            value = query.get(name)
            return None if value is None else int(value)

        return cls(
            number(f"if{suffix}GenerationMatch"),
            number(f"if{suffix}GenerationNotMatch"),
            number(f"if{suffix}MetagenerationMatch"),
        )

    def check(self, found: Object | None, *, reading: bool = False) -> None:
        """Raises ApiError(412), or ApiError(304) where a read asks for anything but the generation it has."""
        generation = found.generation if found else 0
        if self.generation is not None and self.generation != generation:
            raise ApiError(412, f"generation is {generation}, expected {self.generation}")
        if self.not_generation is not None and self.not_generation == generation:
            raise ApiError(304 if reading else 412, f"generation is {generation}")
        if self.metageneration is not None and (found is None or self.metageneration != found.metageneration):
            raise ApiError(412, "metageneration does not match")


@dataclass(frozen=True)
class Object:
    name: str
    body: bytes
    generation: int
    checksum: int
    content_type: str
    created: float
    metageneration: int = 1
    metadata: dict[str, str] = field(default_factory=dict)

    def resource(self, bucket: str) -> dict[str, Any]:
        """As the JSON API describes an object. (Like a composed object, it has no md5Hash.)"""
        stamp = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.created)) + f".{int(self.created * 1000) % 1000:03}Z"
        )
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{self.name}/{self.generation}",
            "bucket": bucket,
            "name": self.name,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "size": str(len(self.body)),
            "crc32c": base64.b64encode(self.checksum.to_bytes(4, "big")).decode(),
            "contentType": self.content_type,
            "storageClass": "STANDARD",
            "etag": f"{self.generation}/{self.metageneration}",
            "timeCreated": stamp,
            "updated": stamp,
            **({"metadata": self.metadata} if self.metadata else {}),
        }


@dataclass(frozen=True)
class Page:
    objects: tuple[Object, ...]
    prefixes: tuple[str, ...]
    next_token: str | None


class Bucket:
    """One bucket. `written`: for each name, when (monotonic seconds) and how often it was written."""

    def __init__(self, name: str, max_bytes: int) -> None:
        self.name = name
        self.bytes = 0
        self.rewritten_too_soon = 0  # writes to one name less than a second after the write before
        self._max_bytes = max_bytes
        self._objects: dict[str, Object] = {}
        self._names: list[str] = []
        self._generations = itertools.count(time.time_ns() // 1000)
        self._written: dict[str, float] = {}

    def find(self, name: str, generation: str | None = None) -> Object:
        """Raises ApiError(404)."""
        found = self._objects.get(name)
        if found is None or (generation is not None and int(generation) != found.generation):
            raise ApiError(404, f"No such object: {self.name}/{name}")
        return found

    def peek(self, name: str) -> Object | None:
        return self._objects.get(name)

    def put(
        self,
        name: str,
        body: bytes,
        conditions: Preconditions,
        content_type: str = "application/octet-stream",
        metadata: dict[str, str] | None = None,
        expected_crc32c: str | None = None,
    ) -> Object:
        """Raises ApiError: 412 precondition, 400 wrong name or checksum, 403 bucket full. Then nothing has changed."""
        if not name or len(name.encode()) > 1024 or any(char in name for char in "\r\n"):
            raise ApiError(400, f"invalid object name {name!r}")
        there = self._objects.get(name)
        conditions.check(there)
        checksum = crc32c.crc32c(body)
        if expected_crc32c is not None and base64.b64decode(expected_crc32c) != checksum.to_bytes(4, "big"):
            raise ApiError(400, f"Provided CRC32C {expected_crc32c!r} does not match what arrived")
        grown = self.bytes + len(body) - (len(there.body) if there else 0)
        if grown > self._max_bytes:
            raise ApiError(403, f"the emulator holds {self._max_bytes} bytes at most (--max_gib)")
        made = Object(name, body, next(self._generations), checksum, content_type, time.time(), 1, metadata or {})
        if there is None:
            bisect.insort(self._names, name)
        self._objects[name] = made
        self.bytes = grown
        self._note_write(name)
        return made

    def _note_write(self, name: str) -> None:
        now = time.monotonic()
        if now - self._written.get(name, -1.0) < 1.0:
            self.rewritten_too_soon += 1
        self._written[name] = now

    def delete(self, name: str, conditions: Preconditions, generation: str | None = None) -> None:
        found = self.find(name, generation)
        conditions.check(found)
        del self._objects[name]
        del self._names[bisect.bisect_left(self._names, name)]
        self._written.pop(name, None)
        self.bytes -= len(found.body)

    def patch(self, name: str, conditions: Preconditions, metadata: dict[str, str | None]) -> Object:
        found = self.find(name)
        conditions.check(found)
        merged = {key: value for key, value in {**found.metadata, **metadata}.items() if value is not None}
        changed = replace(found, metadata=merged, metageneration=found.metageneration + 1)
        self._objects[name] = changed
        return changed

    def list(self, prefix: str, start: str, end: str, delimiter: str, limit: int, token: str | None) -> Page:
        """A page of names in order of their UTF-8 bytes (Python orders code points alike)."""
        after = base64.urlsafe_b64decode(token).decode() if token else ""
        limit = max(1, min(limit, LIST_PAGE_MAX))
        objects: list[Object] = []
        prefixes: list[str] = []
        last = ""
        index = bisect.bisect_left(self._names, max(prefix, start))
        if token:
            index = max(index, bisect.bisect_right(self._names, after))
        while index < len(self._names):
            name = self._names[index]
            if not name.startswith(prefix) or (end and name >= end):
                break
            if len(objects) + len(prefixes) >= limit:
                return Page(tuple(objects), tuple(prefixes), base64.urlsafe_b64encode(last.encode()).decode())
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                prefixes.append(name[: cut + len(delimiter)])
                last = prefixes[-1] + "\U0010ffff"  # after everything below it
                index = bisect.bisect_right(self._names, last)
            else:
                objects.append(self._objects[name])
                last = name
                index += 1
        return Page(tuple(objects), tuple(prefixes), None)

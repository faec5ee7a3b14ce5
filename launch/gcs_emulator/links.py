"""A link of its own to the store for each simulated host: how fast it is, how far away, and what has gone over it.

Hosts on one machine look alike to a server, so each link is a port. Every request that comes in there waits for
`latency_s`, and all that the host sends and gets shares `bytes_per_s`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from launch.gcs_emulator.replies import Answer, response

_PIECE_BYTES = 1 << 20  # of an answer: the first of it need not wait for the last


@dataclass(frozen=True)
class Speed:
    """bytes_per_s: 0: without a limit."""

    bytes_per_s: float = 0.0
    latency_s: float = 0.0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Speed:
        """From JSON. Raises TypeError, ValueError."""
        made = cls(**{name: float(value) for name, value in values.items()})
        if made.bytes_per_s < 0 or made.latency_s < 0:
            raise ValueError(f"{dict(values)}: expected 0 or more of each")
        return made


@dataclass
class Link:
    """sent, received: bytes of objects by name, from the store to the host, and from the host to the store."""

    url: str
    speed: Speed = field(default_factory=Speed)
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    _free_s: float = 0.0  # when what is on the line now has passed

    async def take(self, body: bytes, operation: str, name: str) -> None:
        """A request of the host has come."""
        self.requests[operation] += 1
        if operation == "insert":
            self.received[name] += len(body)
        await asyncio.sleep(self.speed.latency_s)
        await self._carry(len(body))

    async def answer(self, request: web.Request, answer: Answer, name: str) -> web.StreamResponse:
        """Send it to the host."""
        if answer.operation == "media":
            self.sent[name] += len(answer.body)
        if not self.speed.bytes_per_s or len(answer.body) <= _PIECE_BYTES:
            await self._carry(len(answer.body))
            return response(answer)
        stream = web.StreamResponse(status=answer.status, headers=dict(answer.headers))
        stream.content_length = len(answer.body)
        await stream.prepare(request)
        for first in range(0, len(answer.body), _PIECE_BYTES):
            piece = answer.body[first : first + _PIECE_BYTES]
            await self._carry(len(piece))
            await stream.write(piece)
        return stream

    async def _carry(self, size: int) -> None:
        """Wait until so many bytes have passed, behind what is on the line already."""
        if self.speed.bytes_per_s:
            now = asyncio.get_running_loop().time()
            self._free_s = max(now, self._free_s) + size / self.speed.bytes_per_s
            await asyncio.sleep(self._free_s - now)

    def as_json(self) -> dict[str, Any]:
        counted = {"requests": self.requests, "sent": self.sent, "received": self.received}
        return {"url": self.url, **{name: dict(counter) for name, counter in counted.items()}}


class Links:
    """By the port that a request came to. Requests to another port have none: no limit, and they are not counted."""

    def __init__(self) -> None:
        self._by_port: dict[int, Link] = {}

    def add(self, port: int, url: str) -> None:
        self._by_port[port] = Link(url)

    def of(self, request: web.Request) -> Link | None:
        name = request.transport.get_extra_info("sockname") if request.transport else None
        return self._by_port.get(name[1]) if name else None

    def set_speed(self, speed: Speed) -> None:
        for link in self._by_port.values():
            link.speed = speed

    def reset(self) -> None:
        for link in self._by_port.values():
            for counter in (link.requests, link.sent, link.received):
                counter.clear()

    def as_json(self) -> list[dict[str, Any]]:
        return [link.as_json() for link in self._by_port.values()]

"""How an answer goes out: as it is, altered, in part, late, or not at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web

from launch.gcs_emulator.bucket import ApiError
from launch.gcs_emulator.faults import ReplyRule

_POLL_S = 0.05  # whether a client that gets no answer has gone


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    operation: str = "other"


def json_answer(value: Any, operation: str, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=UTF-8"}, operation)


def rejection(error: ApiError, operation: str = "other") -> Answer:
    if error.status == 304:
        return Answer(304, operation=operation)
    cause = {"message": str(error), **({"reason": error.reason} if error.reason else {})}
    body = {"error": {"code": error.status, "message": str(error), "errors": [cause]}}
    return json_answer(body, operation, error.status)


def response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=dict(answer.headers))


def hang_up(request: web.Request) -> web.Response:
    if request.transport:
        request.transport.abort()
    return web.Response(status=500)


async def stay_silent(request: web.Request) -> web.Response:
    """No answer for as long as the client waits."""
    while request.transport and not request.transport.is_closing():
        await asyncio.sleep(_POLL_S)
    return hang_up(request)


async def cut(request: web.Request, answer: Answer, size: int) -> web.StreamResponse:
    """The headers promise the whole body, the first `size` bytes of it come."""
    response = web.StreamResponse(status=answer.status, headers=dict(answer.headers))
    response.content_length = len(answer.body)
    await response.prepare(request)
    await response.write(answer.body[:size])
    if request.transport:
        request.transport.close()
    return response


async def trickle(request: web.Request, answer: Answer, pause_s: float) -> web.StreamResponse:
    """The right answer, a byte at a time, for as long as the client stays."""
    response = web.StreamResponse(status=answer.status, headers=dict(answer.headers))
    response.content_length = len(answer.body)
    await response.prepare(request)
    for index in range(len(answer.body)):
        if request.transport is None or request.transport.is_closing():
            break
        await response.write(answer.body[index : index + 1])
        await asyncio.sleep(pause_s)
    return response


def altered(rule: ReplyRule, answer: Answer) -> Answer:
    """An answer that says other than what is stored; its headers are those of what is."""
    if rule.kind == "flip" and answer.body:
        middle = len(answer.body) // 2
        flipped = bytes([answer.body[middle] ^ 1])
        return replace(answer, body=answer.body[:middle] + flipped + answer.body[middle + 1 :])
    if rule.kind == "short":
        return replace(answer, body=answer.body[: int(rule.value)])
    if rule.kind == "range":
        return replace(answer, headers={**answer.headers, "Content-Range": "bytes 7-9/11"})
    return answer

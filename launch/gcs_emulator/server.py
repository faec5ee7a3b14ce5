"""The emulator's HTTP side: every request meets its faults here, and is then carried out by `api` or `control`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web

from launch.gcs_emulator import paths
from launch.gcs_emulator.api import ObjectApi
from launch.gcs_emulator.batch import batch
from launch.gcs_emulator.bucket import ApiError
from launch.gcs_emulator.control import PREFIX, Control
from launch.gcs_emulator.faults import Faults, ReplyRule
from launch.gcs_emulator.links import Links
from launch.gcs_emulator.replies import Answer, altered, cut, hang_up, rejection, response, stay_silent, trickle
from launch.gcs_emulator.request_log import LoggedRequest

BODY_BYTES_MAX = 1 << 30
_INJECTED = (("too_many", 429), ("unavailable", 503))


class Emulator:
    """One handler for every request."""

    def __init__(self, buckets: tuple[str, ...], faults: Faults, max_bytes: int) -> None:
        self._api = ObjectApi(buckets, max_bytes)
        self._control = Control(self._api, faults)
        self._dice = self._control.dice

    @property
    def links(self) -> Links:
        return self._control.links

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if path.startswith(PREFIX):
            return await self._control.answer(request)
        with self._control.log.record(*paths.identify(request.method, path, request.query)) as logged:
            return await self._handled(request, path, logged)

    async def _handled(self, request: web.Request, path: str, logged: LoggedRequest) -> web.StreamResponse:
        if self._dice.faults.down:
            self._dice.counts["down"] += 1
            return hang_up(request)
        if self._dice.hit("slow"):
            await asyncio.sleep(self._dice.faults.slow_s)
        if injected := self._injected():
            return response(injected)
        body = await request.read()
        logged.operation, logged.name = paths.identify(request.method, path, request.query, body)
        link = self.links.of(request)
        if link:
            await link.take(body, logged.operation, logged.name)
        if rule := self._control.rules.hit(logged.operation, logged.name):
            return await self._ruled(rule, request, path, body)
        if request.method != "GET" and self._dice.hit("cut"):
            self._api.uploads.keep_half(request.query.get("upload_id", ""), request.headers, body)
            return hang_up(request)
        answer = self._answer(request, path, dict(request.query), body)
        if self._dice.hit("lost"):
            return hang_up(request)
        if request.method == "GET" and len(answer.body) > 1 and self._dice.hit("cut"):
            return await cut(request, answer, len(answer.body) // 2)
        return await link.answer(request, answer, logged.name) if link else response(answer)

    def _injected(self) -> Answer | None:
        """429 or 503, if chance has it."""
        for kind, status in _INJECTED:
            if self._dice.hit(kind):
                return rejection(ApiError(status, f"injected {status}"))
        return None

    async def _ruled(self, rule: ReplyRule, request: web.Request, path: str, body: bytes) -> web.StreamResponse:
        """The answer that `rule` has for this request."""
        if rule.kind == "status":
            status = int(rule.value)
            message = rule.message or f"injected {status} for {path}"
            answer = rejection(ApiError(status, message, rule.reason))
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
        if path.startswith("/batch"):
            return self._batch(request.headers, body)
        base = f"{request.scheme}://{request.host}"
        return self._call(request.method, path, query, request.headers, body, base)

    def _call(
        self, method: str, path: str, query: dict[str, str], headers: Mapping[str, str], body: bytes, base: str
    ) -> Answer:
        """One call of the API, carried out at once and counted by operation; a rejected one is charged for, too."""
        operation = paths.operation_of(method, path, query)
        try:
            if guard := self._control.guards.get(paths.bucket_of(path) or ""):
                guard.check(query, headers)
            if self._dice.faults.read_only and method != "GET":
                raise ApiError(403, "the caller does not have storage.objects.create or delete access")
            answer = self._api.call(method, path, query, headers, body, base)
        except ApiError as error:
            answer = rejection(error, operation)
        except ValueError as error:
            answer = rejection(ApiError(400, f"invalid request: {error}"), operation)
        self._control.operations[answer.operation] += 1
        return answer

    def _batch(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """Each call of a batch has a status of its own, and meets 429 and 503 by itself."""
        own = {name: value for name, value in headers.items() if name.lower() == "authorization"}

        def call(method: str, target: str) -> Answer:
            if injected := self._injected():
                return injected
            url = urlsplit(target)
            query = dict(parse_qsl(url.query))
            rule = self._control.rules.hit(*paths.identify(method, url.path, query))
            if rule and rule.kind == "status":
                error = ApiError(int(rule.value), rule.message or f"injected {rule.value:g}", rule.reason)
                return rejection(error)
            return self._call(method, url.path, query, own, b"", "")

        try:
            answer = batch(headers, body, call)
        except ApiError as error:
            return rejection(error)
        self._control.operations["batch"] += 1
        return answer

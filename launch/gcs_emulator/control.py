"""The emulator's own paths, below `/_emulator/`: what tests and benchmarks ask of it and set.

`faults` (GET, PUT), `rules/GROUP` (GET, PUT), `guards/BUCKET` (PUT), `links` (GET; PUT sets their speed), `counts`
(GET, DELETE) and `requests` (GET; DELETE of the counts clears it, and what the links have counted).
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from aiohttp import web

from launch.gcs_emulator.api import ObjectApi
from launch.gcs_emulator.faults import Dice, Faults, ReplyRule, ReplyRules
from launch.gcs_emulator.guard import Guard
from launch.gcs_emulator.links import Links, Speed
from launch.gcs_emulator.request_log import RequestLog

PREFIX = "/_emulator/"
# What the service charges for: class A (writes and listings), class B (reads), free (deletes).
CLASS_OF = {"insert": "A", "list": "A", "patch": "A", "copy": "A", "get": "B", "media": "B", "delete": "free"}


class Control:
    """What can be set and counted from outside."""

    def __init__(self, api: ObjectApi, faults: Faults) -> None:
        self._api = api
        self.dice = Dice(faults)
        self.rules = ReplyRules()
        self.guards: dict[str, Guard] = {}
        self.operations: Counter[str] = Counter()
        self.log = RequestLog()
        self.links = Links()

    async def answer(self, request: web.Request) -> web.Response:
        try:
            found = await self._answer(request.method, request.rel_url.raw_path.removeprefix(PREFIX), request)
        except (ValueError, TypeError, re.error) as error:
            return web.json_response({"error": str(error)}, status=400)
        if found is None:
            text = f"choose from {PREFIX}: faults, rules/GROUP, guards/BUCKET, links, counts, requests"
            return web.json_response({"error": text}, status=404)
        return web.json_response(found)

    async def _answer(self, method: str, path: str, request: web.Request) -> Any:
        """None for a path that is none. Raises ValueError, TypeError, re.error for what cannot be set."""
        what, _, name = path.partition("/")
        match what, method:
            case "faults", "PUT":
                self.dice.set(Faults.of(await request.json()))
                return vars(self.dice.faults)
            case "faults", _:
                return vars(self.dice.faults)
            case "rules", _:
                if method == "PUT":
                    self.rules.set(name, [ReplyRule.of(one) for one in await request.json()])
                return {"hits": self.rules.counts[name]}
            case "guards", "PUT":
                self.guards[name] = Guard.of(await request.json())
                return {}
            case "links", _:
                if method == "PUT":
                    self.links.set_speed(Speed.of(await request.json()))
                return self.links.as_json()
            case "requests", _:
                return self.log.as_json()
            case "counts", _:
                counts = self._counts()
                if method == "DELETE":
                    self._reset()
                return counts
        return None

    def _counts(self) -> dict[str, Any]:
        classes: Counter[str] = Counter()
        for operation, count in self.operations.items():
            if operation in CLASS_OF:
                classes[CLASS_OF[operation]] += count
        buckets = self._api.buckets.values()
        return {
            "operations": dict(self.operations),
            "classes": dict(classes),
            "faults": dict(self.dice.counts),
            "bytes": sum(bucket.bytes for bucket in buckets),
            "rewritten_too_soon": sum(bucket.rewritten_too_soon for bucket in buckets),
        }

    def _reset(self) -> None:
        self.operations.clear()
        self.log.clear()
        self.links.reset()
        self.dice.counts.clear()
        for bucket in self._api.buckets.values():
            bucket.rewritten_too_soon = 0

"""Faults on command: which request meets which fault. Counted, and the same for every client.

`Faults` are drawn by seeded chance for all requests. A `ReplyRule` is certain: these requests get this answer.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Faults:
    """Rates from 0 to 1 of each fault, drawn per request.

    too_many: 429. unavailable: 503. slow: `slow_s` seconds late. cut: the connection ends in the middle of the data,
    an upload has not landed. lost: the request is carried out and the connection ends before the reply. down: no
    request is answered. read_only: writes are rejected with 403, as IAM does for a reader's credential.
    """

    too_many: float = 0.0
    unavailable: float = 0.0
    slow: float = 0.0
    cut: float = 0.0
    lost: float = 0.0
    slow_s: float = 1.0
    down: bool = False
    read_only: bool = False
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Faults:
        """From JSON. Raises ValueError for unknown names, wrong types and rates outside 0 to 1."""
        kinds = {one.name: type(getattr(cls, one.name)) for one in fields(cls)}
        made = {}
        for name, value in values.items():
            if name not in kinds:
                raise ValueError(f"no fault {name!r}; choose from {', '.join(kinds)}")
            if kinds[name] is bool and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: expected true or false")
            made[name] = kinds[name](value)
        faults = replace(cls(), **made)
        for name in RATES:
            if not 0 <= getattr(faults, name) <= 1:
                raise ValueError(f"{name}={getattr(faults, name)}: expected a rate from 0 to 1")
        return faults

    @classmethod
    def parse(cls, text: str) -> Faults:
        """From `lost=0.3,slow=0.1,slow_s=2`. Raises ValueError."""
        pairs: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, separator, value = part.partition("=")
            flag = {"true": True, "false": False}.get(value.lower())
            pairs[name.strip()] = True if not separator else value if flag is None else flag
        return cls.of(pairs)


RATES = ("too_many", "unavailable", "slow", "cut", "lost")


class Dice:
    """Draws the faults of each request and counts them."""

    def __init__(self, faults: Faults) -> None:
        self.counts: Counter[str] = Counter()
        self.set(faults)

    def set(self, faults: Faults) -> None:
        self.faults = faults
        self._random = random.Random(faults.seed)

    def hit(self, kind: str) -> bool:
        if self._random.random() >= getattr(self.faults, kind):
            return False
        self.counts[kind] += 1
        return True


RULE_KINDS = ("status", "flip", "cut", "short", "range", "type", "slow", "hang", "trickle")


@dataclass(frozen=True)
class ReplyRule:
    """What certain requests get instead of the right answer.

    name: a regular expression found in the object's name, or in a listing's prefix. operations: media, get, list,
    insert, delete. skip: as many requests are answered rightly before. times: as many meet it; 0: all.

    kind, with `value`: status: HTTP `value`, with `message`, `reason` and a header `retry_after`. flip: one bit of the
    body, while the hash in the headers stays the object's. cut: the connection ends after `value` bytes of the body.
    short: a whole answer, whose body has only `value` bytes. range: a `Content-Range` of other bytes. type: a page of
    HTML with status 200, as proxies send. slow: `value` seconds late. hang: no answer at all. trickle: one byte of the
    body each `value` seconds.
    """

    name: str
    kind: str = "status"
    value: float = 0.0
    operations: tuple[str, ...] = ("media", "get")
    skip: int = 0
    times: int = 0
    message: str = ""
    reason: str = ""
    retry_after: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ReplyRule:
        """From JSON. Raises ValueError, TypeError."""
        made = cls(**{**values, "operations": tuple(values.get("operations", cls.operations))})
        if made.kind not in RULE_KINDS:
            raise ValueError(f"kind={made.kind!r}: choose from {', '.join(RULE_KINDS)}")
        if made.kind == "status" and not 200 <= made.value < 600:
            raise ValueError(f"value={made.value:g}: expected a status of HTTP")
        re.compile(made.name)
        return made


class ReplyRules:
    """Rules in named groups, so that clients beside each other do not meet each other's. Counted by group."""

    def __init__(self) -> None:
        self._groups: dict[str, list[tuple[ReplyRule, Counter[str]]]] = {}
        self.counts: Counter[str] = Counter()

    def set(self, group: str, rules: Sequence[ReplyRule]) -> None:
        self._groups[group] = [(rule, Counter()) for rule in rules]
        if not rules:
            del self._groups[group]

    def hit(self, operation: str, name: str) -> ReplyRule | None:
        """The first rule that this request meets."""
        for group, rules in self._groups.items():
            for rule, seen in rules:
                if operation in rule.operations and re.search(rule.name, name):
                    seen["requests"] += 1
                    if seen["requests"] > rule.skip and (not rule.times or seen["hits"] < rule.times):
                        seen["hits"] += 1
                        self.counts[group] += 1
                        return rule
        return None

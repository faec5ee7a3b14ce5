"""`orchestrator diff ROOT A B`: which arrays differ between two steps."""

from __future__ import annotations

from dataclasses import asdict

from orchestrator.cli import render
from orchestrator.cli.commands import Flags, live_step, open_catalog
from orchestrator.errors import EXIT_FAILED, EXIT_OK, UsageError


def diff(root: str, flags: Flags) -> int:
    from orchestrator.tools import diff as rules

    first, second = open_catalog(root), open_catalog(flags["other"] or root)
    lives = live_step(first, _step(flags["a"])), live_step(second, _step(flags["b"]))
    a, b = rules.Side(first, lives[0]), rules.Side(second, lives[1])
    with render.progress("bytes") as display:
        bar = render.Bar(display, "reading", None)
        told = rules.compare(a, b, measure=flags["max_difference"], on_bytes=bar.add)
    differing = [one for one in told if one.state != "equal"]
    if flags["json"]:
        sides = {"a": lives[0].step, "b": lives[1].step, "root": first.url, "other": second.url}
        render.give({**sides, "equal": len(told) - len(differing), "differing": [asdict(one) for one in differing]})
        return EXIT_FAILED if differing else EXIT_OK
    columns = ["leaf", "a", "b", "state", "found by", *(["elements", "largest"] if flags["max_difference"] else [])]
    rows = []
    for one in told if flags["all"] else differing:
        row = [one.leaf, one.a, one.b if one.b != one.a else "", one.state, one.by]
        if flags["max_difference"]:
            row += ["" if value is None else f"{value:g}" for value in (one.elements, one.largest)]
        rows.append(row)
    if rows:
        render.table(columns, rows, right=["elements", "largest"])
    render.say(f"{len(differing)} of {len(told)} leaves differ between step {lives[0].step} and step {lives[1].step}")
    return EXIT_FAILED if differing else EXIT_OK


def _step(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text!r} is not a step; usage: orchestrator diff ROOT A B, where A and B are steps")
    return int(text)

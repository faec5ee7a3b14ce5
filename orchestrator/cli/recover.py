"""`orchestrator recover`: what is whole in a run whose journal is lost, and the entry that it goes on from."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec

from orchestrator.cli import render
from orchestrator.cli.commands import open_catalog
from orchestrator.errors import EXIT_DAMAGED, EXIT_OK
from orchestrator.rules import keys
from orchestrator.tools.recover import Plan, plan, write


class Attempt(msgspec.Struct, forbid_unknown_fields=True):
    """An attempt in storage. problem: what is missing of it, '' if it is whole. outcome: `kept` (the journal has it),
    `added` (a recovered entry would have it) or why neither. saved: seconds since 1970, 0 where that cannot be read."""

    step: int
    attempt: str
    bytes: int
    saved: float
    problem: str
    outcome: str


class Recovery(msgspec.Struct, forbid_unknown_fields=True):
    """`recover`. version, epoch: of the newest entry that can be read, -1 and 0 without one. lost: what proves that
    entries are missing. unreadable: keys of entries that cannot be read. written: the version that was created."""

    root: str
    version: int
    epoch: int
    lost: str
    unreadable: list[str]
    attempts: list[Attempt]
    written: int | None


def recover(root: str, flags: dict[str, Any]) -> int:
    """4 if entries are missing and nothing was written, else 0."""
    catalog = open_catalog(root)
    with render.progress() as display:
        bar = render.Bar(display, "reading attempts", None)
        found = plan(catalog, on_attempt=lambda attempt: bar.add(1))
    if not found.whole and found.head is None and not found.needed:
        catalog.require_head()  # not a run
    written = write(catalog, found).version if flags["write"] else None
    told = _told(catalog.url, found, written)
    if flags["json"]:
        render.give(msgspec.to_builtins(told))
    else:
        _say(told, found, shlex.quote(root))
    return EXIT_DAMAGED if found.needed and written is None else EXIT_OK


def _told(url: str, found: Plan, written: int | None) -> Recovery:
    added = {live.id for live in found.choice.added}
    left_out = {live.id: why for live, why in found.choice.left_out}
    known = {live.id for live in (*found.head.live, *found.head.aside)} if found.head else set()
    retired = {gone.id for gone in found.head.retired} if found.head else set()
    attempts = []
    for key, (live, problem) in found.whole.items():
        outcome = "added" if key in added else "kept" if key in known else left_out.get(key, "left out")
        if key in retired:
            outcome = "retired"
        size, saved = (live.bytes, live.time) if live else (0, 0.0)
        attempts.append(Attempt(*key, bytes=size, saved=saved, problem=problem, outcome=outcome))
    version, epoch = (found.head.version, found.head.epoch) if found.head else (-1, 0)
    return Recovery(url, version, epoch, found.lost, list(found.unreadable), attempts, written)


def _say(told: Recovery, found: Plan, root: str) -> None:
    rows = [
        [
            str(one.step),
            one.attempt,
            render.size(one.bytes) if one.bytes else "",
            render.moment(one.saved) if one.saved else "",
            one.problem or "whole",
            one.outcome,
        ]
        for one in told.attempts
    ]
    if rows:
        render.table(["step", "attempt", "size", "saved", "state", "outcome"], rows, right=["step", "size"])
    else:
        render.say("no attempts")
    head = f"version {told.version} of epoch {told.epoch}" if found.head else "none that can be read"
    render.say(f"newest entry of the journal: {head}")
    for why in found.unreadable.values():
        render.say(f"cannot be read: {why}")
    if found.version > keys.VERSION_MAX:
        render.say("no version comes after the newest entry, which no job has written: move it out of the run first")
    if told.lost:
        render.say(f"entries are missing: {told.lost}")
    if told.written is not None:
        steps = ", ".join(str(live.step) for live in found.choice.live) or "no steps"
        render.say(f"created version {told.written}, `recovered`, epoch {found.epoch}: {steps}")
        render.say(f"then: orchestrator verify {root} --all")
    elif found.needed or found.choice.added:
        render.say(f"with --write the run goes on from version {found.version} with the steps above, added and kept;")
        render.say("stop the job first, and copy again what a broken copy has left out")
    else:
        render.say("nothing to recover")

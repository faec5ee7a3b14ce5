"""`orchestrator recover`: what is whole in a run whose journal is lost, and the entry that it goes on from."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.errors import EXIT_DAMAGED, EXIT_OK
from orchestrator.rules import keys
from orchestrator.tools import recover


class RecoverableAttempt(Result, frozen=True):
    """An attempt in storage. problem: what is missing of it, '' if it is whole. outcome: `kept` (the journal has it),
    `added` (a recovered entry would have it) or why neither. saved: seconds since 1970, 0 where that cannot be read."""

    step: int
    attempt: str
    bytes: int
    saved: float
    problem: str
    outcome: str


class Recovery(Result, frozen=True):
    """`recover`. version, epoch: of the newest entry that can be read, -1 and 0 without one. lost: what proves that
    entries are missing. unreadable: keys of entries that cannot be read. written: the version that was created."""

    root: str
    version: int
    epoch: int
    lost: str
    unreadable: tuple[str, ...]
    attempts: tuple[RecoverableAttempt, ...]
    written: int | None


@dataclass(frozen=True)
class Recovered:
    """What was found, and the version that was written; None: none was. `given`: the root as the user wrote it."""

    given: str
    url: str
    found: recover.RecoveryPlan
    written: int | None


def run(root: str, flags: Flags) -> Recovered:
    store = open_store(root)
    with render.bar("reading attempts", None) as bar:
        found = recover.plan(store, on_attempt=lambda attempt: bar.add(1))
    if not found.attempts and found.head is None and not found.required:
        store.require_head()  # not a run
    written = recover.write(store, found).version if flags["write"] else None
    return Recovered(root, store.url, found, written)


def encode(done: Recovered) -> Recovery:
    head = done.found.head
    version, epoch = (head.version, head.epoch) if head else (-1, 0)
    unreadable = tuple(done.found.unreadable)
    return Recovery(done.url, version, epoch, done.found.lost, unreadable, tuple(_attempts(done.found)), done.written)


def _attempts(found: recover.RecoveryPlan) -> Iterator[RecoverableAttempt]:
    added = {live.id for live in found.choice.added}
    left_out = {live.id: why for live, why in found.choice.left_out}
    known = {live.id for live in (*found.head.live, *found.head.aside)} if found.head else set()
    retired = {gone.id for gone in found.head.retired} if found.head else set()
    for key, one in found.attempts.items():
        outcome = "added" if key in added else "kept" if key in known else left_out.get(key, "left out")
        if key in retired:
            outcome = "retired"
        size, saved = (one.entry.bytes, one.entry.time) if one.entry else (0, 0.0)
        yield RecoverableAttempt(*key, bytes=size, saved=saved, problem=one.problem, outcome=outcome)


def show(done: Recovered, flags: Flags) -> Iterator[render.Shown]:
    found, root = done.found, shlex.quote(done.given)
    rows = [
        [
            str(one.step),
            one.attempt,
            render.size(one.bytes) if one.bytes else "",
            render.moment(one.saved) if one.saved else "",
            one.outcome,
            one.problem or "whole",
        ]
        for one in _attempts(found)
    ]
    if rows:
        yield render.rows(["step", "attempt", "size", "saved", "outcome", "state"], rows, right=["step", "size"])
    else:
        yield "no attempts"
    head = f"version {found.head.version} of epoch {found.head.epoch}" if found.head else "none that can be read"
    yield f"newest entry of the journal: {head}"
    for why in found.unreadable.values():
        yield f"cannot be read: {why}"
    if found.version > keys.VERSION_MAX:
        yield "no version comes after the newest entry, which no job has written: move it out of the run first"
    if found.lost:
        yield f"entries are missing: {found.lost}"
    if done.written is not None:
        steps = ", ".join(str(live.step) for live in found.choice.live) or "no steps"
        yield f"created version {done.written}, `recovered`, epoch {found.epoch}: {steps}"
        yield f"then: orchestrator verify {root} --all"
    elif found.required or found.choice.added:
        yield f"with --write the run goes on from version {found.version} with the steps above, added and kept;"
        yield "stop the job first, and copy again what a broken copy has left out"
    else:
        yield "nothing to recover"


def exit_code(done: Recovered) -> int:
    """4 if entries are missing and nothing was written."""
    return EXIT_DAMAGED if done.found.required and done.written is None else EXIT_OK


COMMAND = Command(
    run,
    show,
    "a run whose journal is lost: what is whole, and going on from it",
    flags=(Flag("write", bool, False, "create the entry that the run goes on from; no job may be using the run"),),
    examples=("orchestrator recover /data/run", "orchestrator recover /data/run --write"),
    exit_code=exit_code,
    encode=encode,
)

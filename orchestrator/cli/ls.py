"""`orchestrator ls`: the steps of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.cli.held import HeldHere, HeldNow, lines
from orchestrator.rules import journal
from orchestrator.rules.records import LiveStep, RetiredAttempt
from orchestrator.run import survey

METRICS_SHOWN = 8  # of each step
_REASON_CHARS = 200
_ROOMY_COLUMNS = 110  # a narrower terminal has no room for the time beside the age


class UncommittedAttempt(Result, frozen=True):
    step: int
    attempt: str


class Listing(Result, frozen=True):
    """`ls`. newest: the step that a restore takes from the store. steps: in the order of their commits. aside:
    quarantined attempts whose step was saved again. held: in memory, on this machine."""

    root: str
    version: int
    epoch: int
    newest: int | None
    steps: tuple[LiveStep, ...]
    retired: tuple[RetiredAttempt, ...]
    aside: tuple[LiveStep, ...]
    uncommitted: tuple[UncommittedAttempt, ...]
    held: tuple[HeldNow, ...] = ()


def run(root: str, flags: Flags) -> Listing:
    store = open_store(root)
    head = store.require_head()
    newest = journal.newest(head)
    unknown = sorted(attempt for attempt in survey.attempts(store.storage) if not journal.is_known(head, attempt))
    return Listing(
        root=store.url,
        version=head.version,
        epoch=head.epoch,
        newest=newest.step if newest else None,
        steps=head.live,
        retired=head.retired,
        aside=head.aside,
        uncommitted=tuple(UncommittedAttempt(*key) for key in unknown),
        held=HeldHere(store).now(head),
    )


def show(listing: Listing, flags: Flags) -> Iterator[render.Shown]:
    wide, now = flags["wide"], time.time()
    screen = render.screen()
    narrow = screen is not None and screen[0] < _ROOMY_COLUMNS
    rows = [_row(live, listing.newest, now) for live in reversed(listing.steps)]
    if rows:
        columns = ["", "step", "attempt", "status", "age", "saved", "size", "metrics"]
        hidden = {"attempt": not wide, "saved": narrow and not wide, "age": narrow and wide}
        kept = [index for index, name in enumerate(columns) if not hidden.get(name)]
        shown = [[row[index] for index in kept] for row in rows]
        yield render.rows([columns[index] for index in kept], shown, right=["step", "age", "size"])
    else:
        yield "no committed steps"
    if listing.newest is None:
        yield render.toned("no step can be restored", "bad")
    for text, tone in lines(listing.held, now):
        yield render.toned(text, tone)
    for live in reversed((*listing.aside, *listing.steps)):
        if why := live.quarantine:
            by = "by hand, " if why.by_hand else ""
            name = live.id.label if wide or live in listing.aside else f"step {live.step}"
            text = f"{name} quarantined {by}{render.age(now - why.time)}: {why.reason[:_REASON_CHARS]}"
            yield render.toned(text, "bad")
    size = render.size(sum(live.bytes for live in listing.steps))
    steps = render.counted(len(listing.steps), "step")
    counts = [f"{steps}, {size}; epoch {listing.epoch}, journal version {listing.version}"]
    if listing.uncommitted:
        counts.append(f"{len(listing.uncommitted)} uncommitted")
    if listing.aside:
        counts.append(f"{len(listing.aside)} quarantined and saved again")
    if listing.retired:
        counts.append(f"{len(listing.retired)} to be deleted (orchestrator gc)")
    yield "; ".join(counts)


def _row(live: LiveStep, newest: int | None, now: float) -> list[render.Cell]:
    return [
        "*" if live.step == newest else "",
        str(live.step),
        live.attempt,
        render.toned(live.trust),
        render.age(now - live.time),
        render.moment(live.time),
        render.size(live.bytes),
        _metrics_and_pins(live),
    ]


def _metrics_and_pins(live: LiveStep) -> str:
    few = dict(list(live.metrics.items())[:METRICS_SHOWN])
    more = len(live.stored_metrics) - len(few) + live.metrics_omitted
    metrics = render.metrics(few) + (f" and {more} more" if more else "")
    return "  ".join(part for part in (metrics, f"pinned: {' '.join(live.pins)}" if live.pins else "") if part)


COMMAND = Command(
    run,
    show,
    "the steps of a run, newest first; * is what a restore takes",
    flags=(Flag("wide", bool, False, "attempts and times, too, however narrow the terminal is"),),
    examples=("orchestrator ls /data/run", "orchestrator ls /data/run --json | jq .newest"),
    detail=(
        "Status: committed, its bytes have not been read since; verified, they were read back whole; restored, a job "
        "has come up on it; quarantined, no restore takes it."
    ),
)

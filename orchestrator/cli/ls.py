"""`orchestrator ls`: the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flags, Result, open_store
from orchestrator.rules import journal
from orchestrator.rules.records import LiveStep, RetiredAttempt
from orchestrator.run import survey

METRICS_SHOWN = 8  # of each step


class UncommittedAttempt(Result, frozen=True):
    step: int
    attempt: str


class Listing(Result, frozen=True):
    """`ls`. newest: the step that a restore takes. aside: quarantined attempts whose step was saved again."""

    root: str
    version: int
    epoch: int
    newest: int | None
    steps: tuple[LiveStep, ...]
    retired: tuple[RetiredAttempt, ...]
    aside: tuple[LiveStep, ...]
    uncommitted: tuple[UncommittedAttempt, ...]


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
    )


def show(listing: Listing, flags: Flags) -> Iterator[render.Shown]:
    rows = [_row(live, listing.newest) for live in sorted(listing.steps, key=lambda live: live.step)]
    if rows:
        columns = ["", "step", "attempt", "trust", "size", "saved", "metrics", "pins"]
        yield render.table(columns, rows, right=["step", "size"])
    else:
        yield "no committed steps"
    size = render.size(sum(live.bytes for live in listing.steps))
    counts = [f"{len(listing.steps)} steps, {size}; epoch {listing.epoch}, journal version {listing.version}"]
    if listing.uncommitted:
        counts.append(f"{len(listing.uncommitted)} uncommitted")
    if listing.aside:
        counts.append(f"{len(listing.aside)} quarantined and saved again")
    if listing.retired:
        counts.append(f"{len(listing.retired)} to be deleted (orchestrator gc)")
    yield "; ".join(counts)


def _row(live: LiveStep, newest: int | None) -> list[str]:
    few = dict(list(live.metrics.items())[:METRICS_SHOWN])
    more = len(live.stored_metrics) - len(few) + live.metrics_omitted
    return [
        "*" if live.step == newest else "",
        str(live.step),
        live.attempt,
        live.trust,
        render.size(live.bytes),
        render.moment(live.time),
        render.metrics(few) + (f" and {more} more" if more else ""),
        " ".join(live.pins),
    ]


COMMAND = Command(
    run,
    show,
    "the steps of a run; * marks the one that a restore takes",
    flags=(),
    examples=("orchestrator ls /data/run", "orchestrator ls /data/run --json | jq .newest"),
)

"""`orchestrator log`: the journal, as the run's audit trail."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.rules import arguments
from orchestrator.rules.records import JournalEvent

# What an event's `steps` are, before their numbers. Events that are not here name none, or ones that say nothing more.
_STEPS_ARE = {"committed": "retired ", "retired": "", "collected": "", "recovered": "steps "}


class LogEntry(Result, frozen=True):
    """`log` prints a list of these: journal entries without the steps."""

    version: int
    epoch: int
    writer: str
    time: float
    event: JournalEvent


def run(root: str, flags: Flags) -> list[LogEntry]:
    store = open_store(root)
    arguments.whole("--last", flags["last"])
    store.require_head()
    entries = [LogEntry(head.version, head.epoch, head.writer, head.time, head.event) for head in store.entries()]
    return entries[-flags["last"] :] if flags["last"] else entries


def show(entries: list[LogEntry], flags: Flags) -> Iterator[render.Shown]:
    rows = [
        [
            str(entry.version),
            render.moment(entry.time),
            str(entry.epoch),
            entry.event.kind,
            "" if entry.event.step is None else str(entry.event.step),
            _what(entry.event),
            entry.writer,
        ]
        for entry in entries
    ]
    columns = ["version", "time", "epoch", "event", "step", "what", "by"]
    yield render.table(columns, rows, right=["version", "epoch", "step"])


def _what(event: JournalEvent) -> str:
    parts = [event.attempt or "", reason_and_causes(event)]
    if event.steps and event.kind in _STEPS_ARE:
        parts.append(_STEPS_ARE[event.kind] + ", ".join(map(str, event.steps)))
    return "; ".join(part for part in parts if part)


def reason_and_causes(event: JournalEvent) -> str:
    """Why it happened; of an abort host by host."""
    causes = [f"process {one.process} ({one.host}) in {one.phase}: {one.cause}" for one in event.failures]
    return "; ".join([*([event.reason] if event.reason else []), *causes])


COMMAND = Command(
    run,
    show,
    "the journal: every change to the run, by whom and why",
    flags=(Flag("last", int, 0, "only the last N entries; 0: all"),),
    examples=("orchestrator log /data/run --last=20",),
)

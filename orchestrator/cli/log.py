"""`orchestrator log`: the journal, as the run's audit trail."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.rules import arguments
from orchestrator.rules.records import JournalEvent

# What an event's `steps` are, before their numbers. Events that are not here name none, or ones that say nothing more.
_STEPS_ARE = {"committed": "retired ", "retired": "", "collected": "", "recovered": "steps "}

_TONED = ("aborted", "quarantined")
_LAST = 20


class LogEntry(Result, frozen=True):
    """`log` prints a list of these: journal entries without the steps."""

    version: int
    epoch: int
    writer: str
    time: float
    event: JournalEvent


def run(root: str, flags: Flags) -> list[LogEntry]:
    store = open_store(root)
    if flags["last"] is not None:
        arguments.whole("--last", flags["last"])
    store.require_head()
    most = flags["last"] if flags["last"] is not None else 0 if flags["json"] or flags["all"] else _LAST
    entries: list[LogEntry] = []
    for version in reversed(store.versions()):
        head = store.entry(version)
        if _is_shown(head.event, flags):
            entries.append(LogEntry(head.version, head.epoch, head.writer, head.time, head.event))
        if most and len(entries) == most:  # a journal grows for years: of what is not asked for nothing is read
            break
    return entries[::-1]


def _is_shown(event: JournalEvent, flags: Flags) -> bool:
    """Programs get all. For people, what deletion has come to is of no interest, unless they ask for it."""
    if flags["step"] is not None and flags["step"] not in (event.step, *event.steps):
        return False
    return flags["json"] or flags["all"] or event.kind != "collected"


def show(entries: list[LogEntry], flags: Flags) -> Iterator[render.Shown]:
    wide = flags["wide"]
    rows: list[list[render.Cell]] = [
        [
            str(entry.version),
            render.moment(entry.time),
            *([str(entry.epoch)] if wide else []),
            render.toned(entry.event.kind, None if entry.event.kind in _TONED else "plain"),
            "" if entry.event.step is None else str(entry.event.step),
            _what(entry, wide),
        ]
        for entry in entries
    ]
    columns = ["version", "time", *(["epoch"] if wide else []), "event", "step", "what"]
    if not rows:
        yield "no such entries"
        return
    yield render.rows(columns, rows, right=["version", "epoch", "step"])
    if entries[0].version and not flags["all"] and flags["step"] is None:
        yield render.toned(f"the newest {len(entries)}, without `collected`; --all shows all, --wide who wrote", "dim")


def _what(entry: LogEntry, wide: bool) -> str:
    event = entry.event
    parts = [event.attempt or "" if wide else "", reason_and_causes(event)]
    if event.kind == "opened-epoch" and not wide:
        parts.append(f"epoch {entry.epoch}")
    if event.steps and event.kind in _STEPS_ARE:
        parts.append(_STEPS_ARE[event.kind] + ", ".join(map(str, event.steps)))
    if wide or entry.writer.startswith("cli/"):  # a person did it
        parts.append(f"by {entry.writer if wide else entry.writer.removeprefix('cli/')}")
    return "; ".join(part for part in parts if part)


def reason_and_causes(event: JournalEvent) -> str:
    """Why it happened; of an abort host by host."""
    causes = [f"process {one.process} ({one.host}) in {one.phase}: {one.cause}" for one in event.failures]
    return "; ".join([*([event.reason] if event.reason else []), *causes])


COMMAND = Command(
    run,
    show,
    "the journal: every change to the run, by whom and why",
    flags=(
        Flag("last", int, None, "the last N entries, 0: all; without it the last 20, with --json all"),
        Flag("all", bool, False, "every entry, `collected` included"),
        Flag("wide", bool, False, "epoch, attempt and writer, too"),
        Flag("step", int, None, "only entries about this step"),
    ),
    examples=("orchestrator log /data/run", "orchestrator log /data/run 100 --wide"),
)

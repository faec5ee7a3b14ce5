"""`orchestrator gc`: delete what may be deleted, after retiring what the user has asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from orchestrator import policy
from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store
from orchestrator.errors import EXIT_FAILED, EXIT_OK
from orchestrator.rules import arguments, journal, removal
from orchestrator.rules.records import Head, RetiredAttempt
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore


class DeletedData(Result, frozen=True):
    """`gc`. retired: steps that a dry run would retire. failed: a line for each file that could not be deleted."""

    dry_run: bool
    retired: tuple[int, ...]
    attempts: tuple[RetiredAttempt, ...]
    files: int
    bytes: int
    failed: tuple[str, ...]


def run(root: str, flags: Flags) -> DeletedData:
    store = open_store(root)
    head = store.require_head()
    if flags["keep_last"] is not None:
        arguments.whole("--keep_last", flags["keep_last"], least=1)
    retired = _rehearse(store, head, flags) if flags["dry_run"] else ()
    if not flags["dry_run"]:
        for rule in _rules(flags):
            store.append(rule)
    with render.bar("deleting", None) as bar:
        done = collect(store, dry_run=flags["dry_run"], on_file=bar.file)
    return DeletedData(flags["dry_run"], retired, tuple(done.attempts), done.files, done.bytes, tuple(done.failed))


def _rules(flags: Flags) -> Iterator[journal.Rule]:
    """What is to be journalled first."""
    if flags["keep_last"] is not None:
        yield partial(journal.retire, keep=policy.last(flags["keep_last"]))
    if flags["quarantined"] is not None:
        yield partial(removal.discard, step=flags["quarantined"])


def _rehearse(store: JournalStore, head: Head, flags: Flags) -> tuple[int, ...]:
    """The steps that would be retired. Raises what a rule would reject with; writes nothing."""
    retired: tuple[int, ...] = ()
    for rule in _rules(flags):
        outcome = rule(head, store.stamp())
        if isinstance(outcome, journal.Rejected):
            raise outcome.error
        if isinstance(outcome, Head):
            retired = (*outcome.event.steps, *retired)
    return retired


def show(done: DeletedData, flags: Flags) -> Iterator[render.Shown]:
    verb = "would delete" if done.dry_run else "deleted"
    for gone in done.attempts:
        yield f"{verb} {gone.id.label} ({gone.reason})"
    if done.retired:
        yield f"would retire steps {', '.join(map(str, done.retired))}"
    files, attempts = render.counted(done.files, "file"), render.counted(len(done.attempts), "attempt")
    yield f"{verb} {files}, {render.size(done.bytes)}, of {attempts}"
    for line in done.failed:
        yield f"not deleted: {line}"


def exit_code(done: DeletedData) -> int:
    return EXIT_FAILED if done.failed else EXIT_OK


COMMAND = Command(
    run,
    show,
    "delete what is retired or aborted, and what crashes have left",
    flags=(
        Flag("dry_run", bool, False, "say what would be deleted, and delete nothing"),
        Flag("keep_last", int, None, "first retire all but the last N steps; pinned and quarantined ones stay"),
        Flag("quarantined", int, None, "first retire this step's quarantined attempts: nothing else does"),
    ),
    examples=("orchestrator gc /data/run --dry_run", "orchestrator gc /data/run --keep_last=3"),
    exit_code=exit_code,
)

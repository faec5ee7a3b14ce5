"""`orchestrator quarantine` and `orchestrator release`: whether a step can be restored. Its data stays either way."""

from __future__ import annotations

from functools import partial

from orchestrator.cli.changes import Changed, change, show_as
from orchestrator.cli.command import STEP, Command, Flag, Flags, open_store, required_step
from orchestrator.errors import StepNotFound
from orchestrator.rules import journal

_REASON = Flag("reason", str, "by hand", "why; goes into the journal")


def quarantine(root: str, flags: Flags) -> Changed:
    store = open_store(root)
    live = journal.find(store.require_head(), required_step(flags))
    if live is None:
        raise StepNotFound(f"{store.url}: step {flags['step']} is not in this run; see orchestrator ls")
    rule = partial(journal.quarantine, attempt=live.id, reason=flags["reason"], by_hand=True)
    return change(root, flags, rule)


def release(root: str, flags: Flags) -> Changed:
    step, attempt = required_step(flags), flags["attempt"] or ""
    return change(root, flags, partial(journal.release, step=step, attempt=attempt, reason=flags["reason"]))


QUARANTINE = Command(
    quarantine,
    show_as("quarantined"),
    "take a step out of those that can be restored; its data stays",
    flags=(STEP, _REASON),
    examples=("orchestrator quarantine /data/run --step=100 --reason='loss spike'",),
)
RELEASE = Command(
    release,
    show_as("released"),
    "lift the quarantine of a step: it can be restored again",
    flags=(
        STEP,
        Flag("attempt", str, None, "which of the step's quarantined attempts; the latest if unset"),
        _REASON,
    ),
    examples=("orchestrator release /data/run --step=100 --reason='the disk was replaced'",),
)

"""`orchestrator quarantine` and `orchestrator release`: whether a step can be restored. Its data stays either way."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from orchestrator.cli.changes import Changed, change, show_as
from orchestrator.cli.command import REQUIRED_STEP, Command, Flag, Flags, open_store
from orchestrator.errors import StepNotFound, UsageError
from orchestrator.rules import journal

_REASON = Flag("reason", str, None, "why: the journal keeps it, for whoever finds the step", required=True)


def quarantine(root: str, flags: Flags) -> Changed:
    store = open_store(root)
    head = store.require_head()
    live = journal.find(head, flags["step"])
    if live is None:
        raise StepNotFound(f"{store.url}: {journal.not_here(head, flags['step'])}")
    if not flags["reason"].strip():
        raise UsageError("--reason=: expected why, in a few words")
    rule = partial(
        journal.quarantine, attempt=live.id, reason=flags["reason"], by_hand=True, spare_last=not flags["force"]
    )
    return change(root, flags, rule)


def release(root: str, flags: Flags) -> Changed:
    step, attempt = flags["step"], flags["attempt"] or ""
    return change(root, flags, partial(journal.release, step=step, attempt=attempt, reason=flags["reason"]))


QUARANTINE = Command(
    quarantine,
    show_as("quarantined"),
    "take a step out of those that can be restored; its data stays",
    flags=(REQUIRED_STEP, _REASON, Flag("force", bool, False, "even if no other step can be restored")),
    examples=("orchestrator quarantine /data/run 100 --reason='loss spike'",),
)
RELEASE = Command(
    release,
    show_as("released"),
    "lift the quarantine of a step: it can be restored again",
    flags=(
        REQUIRED_STEP,
        Flag("attempt", str, None, "which of the step's quarantined attempts; the latest if unset"),
        replace(_REASON, default="by hand", required=False),
    ),
    examples=("orchestrator release /data/run 100 --reason='the disk was replaced'",),
)

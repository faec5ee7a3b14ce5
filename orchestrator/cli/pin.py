"""`orchestrator pin` and `orchestrator unpin`: protect a step from retention, or no longer."""

from __future__ import annotations

from functools import partial

from orchestrator.cli.changes import Changed, change, show_as
from orchestrator.cli.command import STEP, Command, Flag, Flags, required_step
from orchestrator.errors import UsageError
from orchestrator.rules import journal

_NAME = Flag("name", str, "pin", "name of the pin; a step may have several")


def pin(root: str, flags: Flags) -> Changed:
    return change(root, flags, partial(journal.pin, step=required_step(flags), name=_name(flags)))


def unpin(root: str, flags: Flags) -> Changed:
    return change(root, flags, partial(journal.unpin, step=required_step(flags), name=_name(flags)))


def _name(flags: Flags) -> str:
    if not flags["name"]:
        raise UsageError("--name=: expected the pin's name")
    return str(flags["name"])


PIN = Command(
    pin,
    show_as("pinned"),
    "keep a step whatever the retention policy says",
    flags=(STEP, _NAME),
    examples=("orchestrator pin /data/run --step=100 --name=release",),
)
UNPIN = Command(
    unpin,
    show_as("unpinned"),
    "take a pin off a step",
    flags=(STEP, _NAME),
    examples=("orchestrator unpin /data/run --step=100 --name=release",),
)

"""`orchestrator pin` and `orchestrator unpin`: protect a step from retention, or no longer."""

from __future__ import annotations

from functools import partial

from msgspec.structs import replace

from orchestrator.cli.changes import Changed, change, show_as
from orchestrator.cli.command import REQUIRED_STEP, Command, Flag, Flags
from orchestrator.errors import UsageError
from orchestrator.rules import journal

_NAME = Flag("name", str, "pin", "name of the pin; a step may have several")


def pin(root: str, flags: Flags) -> Changed:
    made = change(root, flags, partial(journal.pin, step=flags["step"], name=_name(flags)))
    if made.step is None or made.step.restorable:
        return made
    step = flags["step"]
    text = f"step {step} is quarantined: the pin keeps its data, but no restore takes it (orchestrator release)"
    return replace(made, warning=text)


def unpin(root: str, flags: Flags) -> Changed:
    return change(root, flags, partial(journal.unpin, step=flags["step"], name=_name(flags)))


def _name(flags: Flags) -> str:
    if not flags["name"]:
        raise UsageError("--name=: expected the pin's name")
    return str(flags["name"])


PIN = Command(
    pin,
    show_as("pinned"),
    "keep a step whatever the retention policy says",
    flags=(REQUIRED_STEP, _NAME),
    examples=("orchestrator pin /data/run 100 --name=release",),
)
UNPIN = Command(
    unpin,
    show_as("unpinned"),
    "take a pin off a step",
    flags=(REQUIRED_STEP, _NAME),
    examples=("orchestrator unpin /data/run 100 --name=release",),
)

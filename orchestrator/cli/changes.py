"""What the commands that change one step's place in the journal have in common. They may do nothing but append."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Flags, Result, open_store
from orchestrator.rules import journal
from orchestrator.rules.records import LiveStep


class Changed(Result, frozen=True):
    """`pin`, `unpin`, `quarantine`, `release`. step: as it is now; None if the run has it no more. warning: what the
    change does not do, though somebody may expect it; '' mostly."""

    changed: bool
    version: int
    step: LiveStep | None
    warning: str = ""


def change(root: str, flags: Flags, rule: journal.Rule) -> Changed:
    """Append what the rule makes of the head, if that is anything."""
    store = open_store(root)
    before = store.require_head()
    after = store.append(rule)
    assert after is not None  # there was a head to change
    return Changed(after.version != before.version, after.version, journal.find(after, flags["step"]))


def show_as(event: str) -> Callable[[Changed, Flags], Iterator[render.Shown]]:
    """`show` of a command whose change is journalled as `event`."""

    def show(made: Changed, flags: Flags) -> Iterator[render.Shown]:
        if made.changed:
            yield f"journal version {made.version}: {event} step {flags['step']}"
        else:
            yield f"step {flags['step']}: nothing to change, it is {event} already"
        if made.warning:
            yield render.toned(f"warning: {made.warning}", "warn")

    return show

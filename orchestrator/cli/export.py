"""`orchestrator export ROOT STEP DEST`: a step as another format."""

from __future__ import annotations

import os

import msgspec

from orchestrator.cli import render
from orchestrator.cli.commands import Flags, live_step, open_catalog
from orchestrator.errors import EXIT_OK, UsageError


class Exported(msgspec.Struct, forbid_unknown_fields=True):
    """`bytes`: of array data written."""

    root: str
    step: int
    attempt: str
    destination: str
    format: str
    bytes: int


def export(root: str, flags: Flags) -> int:
    from orchestrator.tools import export as rules

    if flags["format"] not in rules.FORMATS:
        raise UsageError(f"--format={flags['format']}: choose from {', '.join(rules.FORMATS)}")
    catalog = open_catalog(root)
    live = live_step(catalog, _step(flags["step"]))
    with render.progress("bytes") as display:
        bar = render.Bar(display, f"step {live.step}", live.bytes)
        source = rules.open_source(catalog, live, bar.add)
        written = rules.export(source, flags["dest"], flags["format"])
    done = Exported(
        catalog.url,
        live.step,
        live.attempt,
        os.path.abspath(os.path.expanduser(flags["dest"])),
        flags["format"],
        written,
    )
    if flags["json"]:
        render.give(msgspec.to_builtins(done))
    else:
        render.say(f"step {live.step} {live.attempt}: {render.size(written)} as {done.format} in {done.destination}")
    return EXIT_OK


def _step(text: str) -> int | None:
    if text == "newest":
        return None
    if not text.isdecimal():
        raise UsageError(f"STEP {text!r}: expected the number of a step, or newest")
    return int(text)

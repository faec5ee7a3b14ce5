"""`orchestrator adopt`: take over a directory of Orbax's CheckpointManager."""

from __future__ import annotations

import dataclasses
from typing import Any

from orchestrator.cli import commands, render
from orchestrator.errors import EXIT_OK


def adopt(root: str, flags: dict[str, Any]) -> int:
    from orchestrator.compat.adopt import adopt as take_over  # JAX takes a second to import: only here

    catalog = commands.open_catalog(root)
    skip = frozenset(name for name in flags["skip"].split(",") if name)
    with render.progress() as display:
        bar = render.Bar(display, "reading", None)
        done = take_over(catalog, flags["from"] or root, skip=skip, on_file=bar.file)
    if flags["json"]:
        render.give({"root": catalog.url, **dataclasses.asdict(done)})
        return EXIT_OK
    steps = ", ".join(map(str, done.steps)) or "no new steps"
    render.say(f"adopted {steps}; {render.size(done.bytes)} read once, nothing copied")
    if done.older:
        render.say(f"left where they are, as the run has newer steps: {', '.join(map(str, done.older))}")
    return EXIT_OK

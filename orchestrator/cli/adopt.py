"""`orchestrator adopt`: take over a directory of Orbax's CheckpointManager."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, open_store


class AdoptedSteps(Result, frozen=True):
    """`adopt`. older: steps left where they are, because the run has newer ones."""

    root: str
    steps: tuple[int, ...]
    older: tuple[int, ...]
    bytes: int


def run(root: str, flags: Flags) -> AdoptedSteps:
    from orchestrator.compat.adopt import adopt  # JAX takes a second to import: only here

    store = open_store(root)
    skip = frozenset(name for name in flags["skip"].split(",") if name)
    with render.bar("reading", None) as bar:
        done = adopt(store, flags["from"] or root, skip=skip, on_file=bar.file)
    return AdoptedSteps(store.url, done.steps, done.older, done.bytes)


def show(done: AdoptedSteps, flags: Flags) -> Iterator[render.Shown]:
    steps = ", ".join(map(str, done.steps)) or "no new steps"
    yield f"adopted {steps}; {render.size(done.bytes)} read once, nothing copied"
    if done.older:
        yield f"left where they are, as the run has newer steps: {', '.join(map(str, done.older))}"


COMMAND = Command(
    run,
    show,
    "take over a directory of Orbax's CheckpointManager, without a copy",
    flags=(
        Flag("from", str, None, "where Orbax's steps are; the run's own ROOT if unset"),
        Flag("skip", str, "", "items to leave out, separated by commas"),
    ),
    examples=("orchestrator adopt /data/run", "orchestrator adopt /data/run --from=/data/orbax-run"),
)

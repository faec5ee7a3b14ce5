"""`orchestrator export ROOT STEP DEST`: a step as another format."""

from __future__ import annotations

import os
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, live_step, open_store, step_of


class Exported(Result, frozen=True):
    """`export`. `bytes`: of array data written."""

    root: str
    step: int
    attempt: str
    destination: str
    format: str
    bytes: int


def run(root: str, flags: Flags) -> Exported:
    from orchestrator.tools.export import export, open_source  # JAX takes a second to import: only here

    store = open_store(root)
    live = live_step(store, step_of(flags["step"]))
    with render.bar(f"step {live.step}", live.bytes, "bytes") as bar:
        written_bytes = export(open_source(store, live, bar.add), flags["dest"], flags["format"])
    destination = os.path.abspath(os.path.expanduser(flags["dest"]))
    return Exported(store.url, live.step, live.attempt, destination, flags["format"], written_bytes)


def show(done: Exported, flags: Flags) -> Iterator[render.Shown]:
    yield f"step {done.step} {done.attempt}: {render.size(done.bytes)} as {done.format} in {done.destination}"


COMMAND = Command(
    run,
    show,
    "a step as files of orbax, safetensors or numpy",
    flags=(Flag("format", str, "orbax", "orbax, safetensors or numpy", choices=("orbax", "safetensors", "numpy")),),
    examples=(
        "orchestrator export /data/run newest /data/model.safetensors --format=safetensors",
        "orchestrator export /data/run 100 /data/step-100 --format=numpy",
    ),
    arguments=("STEP", "DEST"),
    detail="Gathered whole from all shards. STEP is a number, or newest. DEST must not exist yet.",
)

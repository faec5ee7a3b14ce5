"""`orchestrator export ROOT [STEP] DEST`: a step as another format, or a whole run as a directory of Orbax's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from orchestrator.cli import render
from orchestrator.cli.command import Command, Flag, Flags, Result, live_step, open_store, step_of
from orchestrator.errors import EXIT_DAMAGED, EXIT_OK, UsageError
from orchestrator.run.journal_store import JournalStore

_SUFFIX = ".safetensors"


class LeftOut(msgspec.Struct, frozen=True):
    """What an export of a whole run has not written of a step, and why."""

    step: int
    why: str


class Exported(Result, frozen=True):
    """`export`. `bytes`: of array data written. Of a whole run, `step` and `attempt` are the newest step's that is
    there now (-1 and "": none), `steps` those that were written and `there` those that were there before; `left_out` is
    what is not there of any step, `damaged` the steps that could not be written."""

    root: str
    step: int
    attempt: str
    destination: str
    format: str
    bytes: int
    steps: tuple[int, ...] = ()
    there: tuple[int, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    damaged: tuple[int, ...] = ()


def run(root: str, flags: Flags) -> Exported:
    from orchestrator.tools.export import export, open_source  # JAX takes a second to import: only here

    form = flags["format"]
    if flags["dest"].endswith(_SUFFIX) and form != "safetensors":  # --format was forgotten
        raise UsageError(f"--format={form} makes a directory; for a file *{_SUFFIX} give --format=safetensors")
    destination = os.path.abspath(os.path.expanduser(flags["dest"]))
    if not flags["step"]:
        return _whole_run(open_store(root), destination, flags)
    store = open_store(root)
    live = live_step(store, step_of(flags["step"]))
    with render.bar(f"step {live.step}", live.bytes, "bytes") as bar:
        written_bytes = export(open_source(store, live, bar.add), flags["dest"], form)
    return Exported(store.url, live.step, live.attempt, destination, form, written_bytes)


def _whole_run(store: JournalStore, destination: str, flags: Flags) -> Exported:
    dest, form = flags["dest"], flags["format"]
    if dest == "newest" or dest.isdecimal():  # the last word is missing, rather than a directory that is called so
        raise UsageError(f"DEST is missing after STEP {dest}; for a whole run in a directory of this name: ./{dest}")
    if form != "orbax":
        raise UsageError(f"--format={form} takes one step: give STEP, or newest; a whole run is exported as orbax")
    from orchestrator.compat.export_run import export_run, to_do

    steps = to_do(store, dest)
    total = sum(live.bytes for live in steps)
    with render.bar(f"{len(steps)} steps", total, "bytes") as bar:
        done = export_run(store, dest, bar.add)
    newest = max([*done.steps, *done.there], default=-1)
    attempt = live_step(store, newest).attempt if newest >= 0 else ""
    return Exported(
        store.url,
        newest,
        attempt,
        destination,
        form,
        sum(done.steps.values()),
        tuple(done.steps),
        tuple(done.there),
        tuple(LeftOut(*each) for each in done.left_out),
        tuple(done.damaged),
    )


def show(done: Exported, flags: Flags) -> Iterator[render.Shown]:
    if flags["step"]:
        yield f"step {done.step} {done.attempt}: {render.size(done.bytes)} as {done.format} in {done.destination}"
        return
    steps = ", ".join(map(str, done.steps)) or "no new steps"
    there = f" ({len(done.there)} were there)" if done.there else ""
    yield f"exported {steps}{there}: {render.size(done.bytes)} in {done.destination}, for Orbax's CheckpointManager"
    for each in done.left_out:
        yield render.toned(f"step {each.step}: not there: {each.why}", "bad" if each.step in done.damaged else "warn")


def exit_code(done: Exported) -> int:
    return EXIT_DAMAGED if done.damaged else EXIT_OK


COMMAND = Command(
    run,
    show,
    "a step as orbax, safetensors or numpy; or a whole run for Orbax",
    flags=(Flag("format", str, "orbax", "orbax, safetensors or numpy", choices=("orbax", "safetensors", "numpy")),),
    examples=(
        "orchestrator export /data/run newest /data/model.safetensors --format=safetensors",
        "orchestrator export /data/run 100 /data/step-100 --format=numpy",
        "orchestrator export /data/run /data/orbax-run",
    ),
    arguments=("[STEP]", "DEST"),
    detail=(
        "Gathered whole from all shards. STEP is a number, or newest; DEST must not exist yet. Without STEP, DEST is a "
        "directory that Orbax's own CheckpointManager opens and goes on in: every step with its items and metrics. "
        "It is new, empty, or an earlier export of this run, to which the steps are added that it does not have."
    ),
    exit_code=exit_code,
)

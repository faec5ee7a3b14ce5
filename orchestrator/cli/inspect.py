"""`orchestrator inspect`: one step, its leaves and who wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from orchestrator.cli import render
from orchestrator.cli.command import STEP, Command, Flags, Result, live_step, open_store
from orchestrator.rules import json_numbers
from orchestrator.rules.matching import brief
from orchestrator.rules.records import FileEntry, LeafSpec, LiveStep
from orchestrator.rules.restore_cost import leaf_bytes
from orchestrator.run.stored_step import StoredStep

_VALUE_CHARS = 40
_PHASES = ("stage", "write", "seal")  # as receipts name them


class InspectedLeaf(LeafSpec, frozen=True, omit_defaults=True, kw_only=True):
    """A leaf as in the tree spec of the on-disk format, and its bytes."""

    bytes: int


class StepWriter(Result, frozen=True):
    """A process that wrote part of a step."""

    process: int
    host: str
    files: int
    bytes: int
    seconds: dict[str, float]


class Inspection(Result, frozen=True):
    """`inspect`. metrics: all of the step's."""

    root: str
    step: LiveStep
    opened_by: str
    epoch: int
    process_count: int
    device_count: int
    mesh: dict[str, int]
    leaves: tuple[InspectedLeaf, ...]
    metrics: dict[str, json_numbers.StoredNumber]
    extra: dict[str, Any]
    files: tuple[FileEntry, ...]
    processes: tuple[StepWriter, ...]


def run(root: str, flags: Flags) -> Inspection:
    store = open_store(root)
    live = live_step(store, flags["step"])
    step = store.step(live)
    manifest, intent, extra = step.manifest, step.intent, step.extra
    leaves = [InspectedLeaf(**msgspec.structs.asdict(leaf), bytes=leaf_bytes(leaf)) for leaf in intent.tree.leaves]
    return Inspection(
        root=store.url,
        step=live,
        opened_by=intent.opened_by,
        epoch=intent.epoch,
        process_count=intent.process_count,
        device_count=intent.device_count,
        mesh=intent.mesh,
        leaves=tuple(leaves),
        metrics=extra.stored_metrics,
        extra=extra.stored_extra,
        files=manifest.files,
        processes=tuple(_writers(step)),
    )


def _writers(step: StoredStep) -> Iterator[StepWriter]:
    found = {receipt.process: receipt for receipt in step.receipts()}
    for index, (host, seconds) in enumerate(zip(step.manifest.hosts, step.manifest.seconds, strict=True)):
        receipt = found.get(index)
        files = receipt.files if receipt else ()
        small = receipt.small.values() if receipt else ()  # files whose bytes are in the receipt
        written_bytes = sum(entry.bytes for entry in files) + sum(map(len, small))
        yield StepWriter(index, host, len(files), written_bytes, seconds)


def show(found: Inspection, flags: Flags) -> Iterator[render.Shown]:
    live = found.step
    mesh = " x ".join(f"{name}={count}" for name, count in found.mesh.items()) or "no mesh"
    yield f"{found.root} {live.id.label}: {live.trust}, saved {render.moment(live.time)}"
    processes = render.counted(found.process_count, "process", "processes")
    yield f"{processes}, {render.counted(found.device_count, 'device')}, {mesh}; opened by {found.opened_by}"
    if found.metrics:
        yield f"metrics: {render.metrics(json_numbers.numbers(found.metrics))}"
    yield ""
    rows = [
        [
            leaf.label,
            brief(leaf.kind, leaf.shape, leaf.dtype),
            leaf.sharding or leaf.value[:_VALUE_CHARS],
            render.size(leaf.bytes) if leaf.kind_stored else "",
        ]
        for leaf in found.leaves
    ]
    yield render.table(["leaf", "type", "sharding or value", "size"], rows, right=["size"])
    yield ""
    rows = [
        [
            str(writer.process),
            writer.host,
            str(writer.files),
            render.size(writer.bytes),
            *(f"{writer.seconds.get(phase, 0.0):.3f} s" for phase in _PHASES),
        ]
        for writer in found.processes
    ]
    columns = ["process", "host", "files", "written", *_PHASES]
    yield render.table(columns, rows, right=[column for column in columns if column != "host"])


COMMAND = Command(
    run,
    show,
    "one step: arrays, shardings, sizes, and who wrote what",
    flags=(STEP,),
    examples=("orchestrator inspect /data/run", "orchestrator inspect /data/run 100"),
)

"""Small valid values of the stored records, so that a test names only what it is about."""

from __future__ import annotations

from typing import Any

from orchestrator.rules import json_numbers
from orchestrator.rules.attempt_id import name_of
from orchestrator.rules.journal import Stamp
from orchestrator.rules.records import (
    Box,
    GroupReceipt,
    Head,
    Intent,
    JournalEvent,
    LeafSpec,
    LiveStep,
    Receipt,
    TreeSpec,
)

FIRST = name_of(1, 1)


def stamp(time: float = 1.0) -> Stamp:
    return Stamp(writer="test", time=time, write_id="id")


def live(step: int, attempt: str = FIRST, **more: Any) -> LiveStep:
    plain: dict[str, Any] = {"manifest_crc32c": "00000000", "tree": "t", "bytes": 1, "time": float(step)}
    metrics = json_numbers.stored_all(more.pop("metrics", {}))
    return LiveStep(step=step, attempt=attempt, stored_metrics=metrics, **{**plain, **more})


def head(*steps: LiveStep, epoch: int = 1, version: int = 7, **more: Any) -> Head:
    plain: dict[str, Any] = {
        "writer": "w",
        "write_id": "before",
        "time": 0.0,
        "event": JournalEvent(kind="opened-epoch"),
    }
    return Head(format=1, version=version, epoch=epoch, live=steps, **{**plain, **more})


def leaf(name: str = "w", shape: tuple[int, ...] = (4,), kind: str = "array", dtype: str = "float32") -> LeafSpec:
    return LeafSpec(path=tuple(name.split("/")), kind=kind, shape=shape, dtype=dtype)


def intent(*leaves: LeafSpec, processes: int = 1, step: int = 100, attempt: str = FIRST) -> Intent:
    return Intent(
        format=1,
        write_id="i",
        step=step,
        attempt=attempt,
        epoch=1,
        opened_by="w",
        time=0.0,
        process_count=processes,
        device_count=processes,
        mesh={},
        tree=TreeSpec(leaves=leaves or (leaf(),)),
    )


def receipt(process: int = 0, *, step: int = 100, attempt: str = FIRST, **more: Any) -> Receipt:
    return Receipt(format=1, write_id="r", step=step, attempt=attempt, process=process, host=f"host-{process}", **more)


def group_receipt(*receipts: Receipt, process: int = 1, number: int = 1) -> GroupReceipt:
    first = receipts[0]
    return GroupReceipt(
        format=1,
        write_id="g",
        step=first.step,
        attempt=first.attempt,
        process=process,
        number=number,
        receipts=receipts,
    )


def box(*bounds: tuple[int, int]) -> Box:
    """`box((0, 2), (4, 8))` is rows 0..2 of columns 4..8."""
    return Box(start=tuple(low for low, _ in bounds), stop=tuple(high for _, high in bounds))

"""Whether the receipts of an attempt cover every array exactly: each element written, and written once. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from orchestrator.rules import holders
from orchestrator.rules.boxes import are_disjoint, is_inside, volume
from orchestrator.rules.records import Box, Intent, Receipt

Written = tuple[tuple[int, tuple[Box, ...]], ...]  # of one array: (process, the regions that it wrote)


def uncovered(intent: Intent, receipts: Mapping[int, Receipt]) -> list[str]:
    """The arrays that the receipts do not cover exactly, one line each; [] if every element is written once."""
    written: dict[str, list[tuple[int, tuple[Box, ...]]]] = {}
    for process, receipt in receipts.items():
        for name, regions in receipt.boxes.items():
            written.setdefault(name, []).append((process, regions))
    problems = []
    judged: dict[tuple[tuple[int, ...], Written], str] = {}  # many leaves of few layouts
    runs = iter(holders.each_of(intent.held))
    for leaf in intent.tree.leaves:
        run = next(runs, None)
        if not leaf.in_store:
            continue
        layout = leaf.file_shape, tuple(written.get(leaf.name, []))
        if layout not in judged:
            judged[layout] = _cover_problem(*layout)
        if problem := judged[layout]:
            missing = holders.why_missing(run, receipts, leaf)
            problems.append(f"{leaf.label}{list(leaf.file_shape)}: {problem}{missing}")
    return problems


def _cover_problem(shape: tuple[int, ...], written: Written) -> str:
    """'' if the regions tile `shape` exactly, else what is wrong."""
    found: Sequence[tuple[int, Box]] = [(process, box) for process, regions in written for box in regions]
    size = math.prod(shape)
    writers: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    elements = 0
    for process, box in found:
        if not is_inside(box, shape):
            return f"process {process} wrote {list(box.start)}..{list(box.stop)}, outside the array"
        other = writers.setdefault((box.start, box.stop), process)
        if other != process or elements > size:
            return f"{list(box.start)}..{list(box.stop)} written twice, by processes {other} and {process}"
        elements += volume(box)
    if elements != size:
        return f"{elements} of {size} elements written"
    return "" if are_disjoint(box for _, box in found) else "written regions overlap"

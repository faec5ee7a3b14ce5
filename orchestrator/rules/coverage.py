"""Whether the receipts of an attempt cover every array exactly: each element written, and written once. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orchestrator.rules import holders
from orchestrator.rules.boxes import are_disjoint, is_inside, volume
from orchestrator.rules.records import Box, Intent, Receipt

Written = tuple[tuple[int, tuple[Box, ...]], ...]  # of one array: (process, the regions that it wrote)


def uncovered(intent: Intent, receipts: Mapping[int, Receipt]) -> list[str]:
    """The arrays that the receipts do not cover exactly, one line each; [] if every element is written once."""
    found = {name: problem for names, problem in _judged(intent, receipts) if problem for name in names}
    problems = []
    runs = iter(holders.each_of(intent.held))
    for leaf in intent.tree.leaves:
        run = next(runs, None)
        if leaf.in_store and (problem := found.get(leaf.name)):
            missing = holders.why_missing(run, receipts, leaf)
            problems.append(f"{leaf.label}{list(leaf.file_shape)}: {problem}{missing}")
    return problems


def _judged(intent: Intent, receipts: Mapping[int, Receipt]) -> Iterator[tuple[list[str], str]]:
    """Names of arrays that are written alike, and what is wrong with each of them: many arrays have few layouts."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for leaf in intent.tree.leaves:
        if leaf.in_store:
            by_shape.setdefault(leaf.file_shape, []).append(leaf.name)
    alike = list(by_shape.items())
    # Equal regions are told apart by comparing, which is many times quicker than hashing them: of 50,000 hosts and 20
    # arrays there are a million.
    for receipt in receipts.values():
        alike = [(shape, names) for shape, together in alike for names in _split(receipt, together)]
    for shape, names in alike:
        regions = ((process, receipt.boxes.get(names[0], ())) for process, receipt in receipts.items())
        yield names, _cover_problem(shape, tuple(regions))


def _split(receipt: Receipt, names: list[str]) -> Iterable[list[str]]:
    """`names` by the regions that this receipt has of them."""
    each = list(map(receipt.boxes.get, names))
    if each.count(each[0]) == len(each):
        return [names]
    by_regions: dict[tuple[Box, ...] | None, list[str]] = {}
    for name, regions in zip(names, each, strict=True):
        by_regions.setdefault(regions, []).append(name)
    return by_regions.values()


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

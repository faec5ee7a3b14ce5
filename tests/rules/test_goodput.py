"""Each second of a run has one kind, and the right one."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.rules.goodput import Incarnation, Mark, Stretch, seconds, split


def steps(first: float, count: int, every_s: float, start: int = 0) -> list[Mark]:
    return [Mark(first + index * every_s, start + index) for index in range(count)]


def one(epoch: int, first: float, last: float, marks: list[Mark], **more: object) -> Incarnation:
    plain: dict[str, object] = {"closed": False}
    return Incarnation(epoch, first, last, marks=marks, **{**plain, **more})  # type: ignore[arg-type]


TRAINED = steps(10, 91, 1)  # steps 0 to 90, one a second, from 10 to 100
HUNG = [*steps(10, 31, 1), *steps(80, 21, 1, 31)]  # 40 s between step 30 and 31
TABLE = {
    "nothing but training after the start": ([one(1, 0, 100, TRAINED)], {"starting": 10, "training": 90}),
    "nothing was trained": ([one(1, 0, 50, [])], {"starting": 50}),
    "a hang of 40 s is not training": ([one(1, 0, 100, HUNG)], {"starting": 10, "training": 51, "stalled": 39}),
    "a hang at the end": ([one(1, 0, 200, TRAINED)], {"starting": 10, "training": 91, "stalled": 99}),
    "a gap that a blocking save explains is the save's": (
        [one(1, 0, 100, HUNG, blocked=[(40.5, 79.5)])],
        {"starting": 10, "training": 51, "blocked": 39},
    ),
    "many steps in a gap: events were lost, training was not": (
        [one(1, 0, 100, [*steps(10, 31, 1), *steps(80, 21, 1, 70)])],
        {"starting": 10, "training": 90},
    ),
    "steps of a minute are no stalls": ([one(1, 0, 610, steps(10, 11, 60))], {"starting": 10, "training": 600}),
    "nothing is known between two commits of a journal": (
        [one(1, 0, 610, [Mark(10, 1, False), Mark(310, 2, False), Mark(610, 3, False)])],
        {"starting": 10, "training": 600},
    ),
    "a failure: down, and its steps again": (
        [one(1, 0, 100, TRAINED), one(2, 130, 200, steps(150, 51, 1, 61))],
        {"starting": 30, "training": 90 + 21, "down": 30, "again": 29},
    ),
    "steps again that lie between two marks": (
        [one(1, 0, 100, TRAINED), one(2, 130, 200, steps(150, 6, 10, 85))],
        # marks every 10 s; steps 85 to 90 are again
        {"starting": 30, "training": 90, "down": 30, "again": 50},
    ),
    "idle after a clean end": (
        [one(1, 0, 100, TRAINED, closed=True), one(2, 1000, 1050, steps(1010, 41, 1, 91))],
        {"starting": 20, "training": 130, "idle": 900},
    ),
    "an older one that writes on after the next has begun": (
        [one(1, 0, 500, TRAINED), one(2, 100, 150, steps(110, 41, 1, 91))],
        {"starting": 20, "training": 130},
    ),
    "nothing": ([], {}),
}


@pytest.mark.parametrize(("incarnations", "expected"), TABLE.values(), ids=TABLE)
def test_each_second_has_the_right_kind(incarnations: list[Incarnation], expected: dict[str, float]) -> None:
    found = split(incarnations)
    assert {kind: spent for kind, spent in seconds(found).items() if spent} == pytest.approx(expected)
    whole(found)


def whole(found: list[Stretch]) -> None:
    """In order, without gaps or overlaps."""
    assert all(a.ended == b.began for a, b in itertools.pairwise(found))
    assert all(stretch.seconds > 0 for stretch in found)

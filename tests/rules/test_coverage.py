"""The coverage check before a commit: every element of every array written, and written once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rules.boxes import whole_box
from orchestrator.rules.coverage import uncovered
from orchestrator.rules.records import Box
from tests.support.builders import box, intent, leaf, receipt


def problems(shape: tuple[int, ...], *per_process: list[Box]) -> list[str]:
    receipts = {index: receipt(index, boxes={"w": tuple(boxes)}) for index, boxes in enumerate(per_process)}
    return uncovered(intent(leaf(shape=shape), processes=len(per_process)), receipts)


def test_exact_covers_have_no_problem() -> None:
    assert problems((4,), [box((0, 4))]) == []
    assert problems((4, 4), [box((0, 2), (0, 4))], [box((2, 4), (0, 2)), box((2, 4), (2, 4))]) == []
    assert problems((), [box()]) == []


@pytest.mark.parametrize(
    ("shape", "boxes", "said"),
    [
        ((4,), [], "w[4]: 0 of 4 elements written"),
        ((4,), [[box((0, 2))], [box((3, 4))]], "w[4]: 3 of 4 elements written"),
        ((4,), [[box((0, 2))], [box((0, 2))]], "w[4]: [0]..[2] written twice, by processes 0 and 1"),
        ((4,), [[box((0, 3))], [box((2, 4))]], "w[4]: 5 of 4 elements written"),
        ((4,), [[box((0, 2)), box((1, 3))]], "w[4]: written regions overlap"),
        ((4,), [[box((0, 2))], [box((2, 5))]], "w[4]: process 1 wrote [2]..[5], outside the array"),
        ((4,), [[box((0, 2), (0, 2))]], "w[4]: process 0 wrote [0, 0]..[2, 2], outside the array"),
        ((4,), [[box((0, 4))], [box((2, 2))]], "w[4]: process 1 wrote [2]..[2], outside the array"),
        ((2, 2), [[box((0, 2), (0, 1))], [box((0, 1), (0, 2))]], "w[2, 2]: written regions overlap"),
        ((), [[box()], [box()]], "w[]: []..[] written twice, by processes 0 and 1"),
        ((), [], "w[]: 0 of 1 elements written"),
    ],
)
def test_gaps_overlaps_and_strays_are_named(shape: tuple[int, ...], boxes: list[list[Box]], said: str) -> None:
    assert problems(shape, *boxes) == [said]


def test_a_box_whose_corners_have_different_ranks_is_an_objection_not_a_crash() -> None:
    crooked = Box(start=(0,), stop=(2, 2))
    assert problems((4,), [crooked]) == ["w[4]: process 0 wrote [0]..[2, 2], outside the array"]


def test_only_stored_arrays_are_to_be_covered_and_keys_in_their_stored_shape() -> None:
    key = leaf("rng", (3,), "key", "key<fry>")
    key = type(key)(path=key.path, kind="key", shape=(3,), dtype=key.dtype, stored_shape=(3, 2), stored_dtype="uint32")
    tree = intent(leaf("lr", (), "float"), leaf("empty", (0, 4)), key, processes=1)
    assert uncovered(tree, {0: receipt(boxes={"rng": (box((0, 3), (0, 2)),)})}) == []
    assert uncovered(tree, {0: receipt(boxes={"rng": (box((0, 3)),)})}) != []


@pytest.mark.parametrize("process", [0, 1])
def test_arrays_of_one_shape_are_judged_apart_where_one_receipt_has_other_regions(process: int) -> None:
    halves = [box((0, 2)), box((2, 4))]
    boxes = [dict.fromkeys("abc", (half,)) for half in halves]
    del boxes[process]["b"]
    boxes[process]["c"] = (halves[1 - process],)
    tree = intent(*(leaf(name) for name in "abcd"), processes=2)
    found = uncovered(tree, {index: receipt(index, boxes=each) for index, each in enumerate(boxes)})
    assert [line.partition(":")[0] for line in found] == ["b[4]", "c[4]", "d[4]"]
    assert "2 of 4" in found[0] and "written twice, by processes 0 and 1" in found[1] and "0 of 4" in found[2]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that tile it: made by cutting the whole again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = [whole_box(shape)]
    for _ in range(draw(st.integers(0, 10))):
        index = draw(st.integers(0, len(boxes) - 1))
        axis = draw(st.integers(0, len(shape) - 1))
        old = boxes[index]
        if old.stop[axis] - old.start[axis] > 1:
            cut = draw(st.integers(old.start[axis] + 1, old.stop[axis] - 1))
            boxes[index] = Box(old.start, (*old.stop[:axis], cut, *old.stop[axis + 1 :]))
            boxes.append(Box((*old.start[:axis], cut, *old.start[axis + 1 :]), old.stop))
    return shape, draw(st.permutations(boxes))


def dealt(boxes: list[Box]) -> list[list[Box]]:
    return [boxes[0::2], boxes[1::2]]


@given(tilings())
def test_any_tiling_covers(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = tiling
    assert problems(shape, *dealt(boxes)) == []


@given(tilings(), st.data())
def test_a_tiling_with_one_box_gone_doubled_or_moved_does_not_cover(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    index = data.draw(st.integers(0, len(boxes) - 1))
    axis = data.draw(st.integers(0, len(shape) - 1))
    by = data.draw(st.sampled_from([-1, 1]))
    chosen = boxes[index]
    gone = boxes[:index] + boxes[index + 1 :]
    moved = Box(
        tuple(start + by * (at == axis) for at, start in enumerate(chosen.start)),
        tuple(stop + by * (at == axis) for at, stop in enumerate(chosen.stop)),
    )
    assert problems(shape, *dealt([*gone]) if gone else [[], []])
    assert problems(shape, *dealt([*boxes, chosen]))
    assert problems(shape, *dealt([*gone, moved]))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4)), max_size=6))
def test_the_verdict_equals_counting_every_element(corners: list[tuple[int, int, int, int]]) -> None:
    boxes = [box((a, a + b), (c, c + d)) for a, b, c, d in corners]
    counts = dict.fromkeys(itertools.product(range(4), range(4)), 0)
    outside = False
    for each in boxes:
        for element in itertools.product(*(range(a, b) for a, b in zip(each.start, each.stop, strict=True))):
            outside = outside or element not in counts
            counts[element] = counts.get(element, 0) + 1
    exact = not outside and set(counts.values()) == {1}
    assert (problems((4, 4), boxes) == []) == exact

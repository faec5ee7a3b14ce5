"""Arithmetic on boxes, against numpy's idea of the same regions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rules import boxes
from orchestrator.rules.records import Box

SHAPE = (4, 5)
bounds = [st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted) for size in SHAPE]
regions = st.tuples(*bounds).map(lambda given: Box(tuple(low for low, _ in given), tuple(high for _, high in given)))
filled = regions.filter(lambda box: boxes.volume(box) > 0)


def elements(box: Box) -> set[tuple[int, ...]]:
    return set(np.ndindex(*SHAPE)) & {
        (row, column) for row in range(box.start[0], box.stop[0]) for column in range(box.start[1], box.stop[1])
    }


@given(filled, filled)
def test_two_boxes_overlap_where_they_share_elements_and_their_intersection_is_those(a: Box, b: Box) -> None:
    shared = elements(a) & elements(b)
    assert boxes.overlap(a, b) == bool(shared)
    assert elements(boxes.intersection(a, b)) == shared
    assert boxes.are_disjoint([a, b]) == (not shared)


@given(regions)
def test_shape_and_volume_are_those_of_the_slice(box: Box) -> None:
    array = np.arange(20).reshape(SHAPE)
    part = array[boxes.slices_in(box, boxes.whole_box(SHAPE))]
    assert (boxes.shape_of(box), boxes.volume(box)) == (part.shape, part.size)


@given(regions)
def test_a_box_is_inside_an_array_if_it_has_elements_and_none_outside(box: Box) -> None:
    assert boxes.is_inside(box, SHAPE) == (boxes.volume(box) > 0)
    assert not boxes.is_inside(boxes.moved(box, (-5, 0)), SHAPE)
    assert not boxes.is_inside(box, SHAPE[:1])


def test_a_shards_index_is_a_box_whole_in_the_dimensions_it_does_not_name() -> None:
    assert boxes.box_of((slice(2, 4),), (8, 3)) == Box((2, 0), (4, 3))
    assert boxes.box_of((), (8, 3)) == boxes.whole_box((8, 3))
    assert boxes.moved(Box((2, 0), (4, 3)), (2, 0)) == Box((0, 0), (2, 3))


def test_a_box_is_labelled_as_people_write_it() -> None:
    assert [boxes.box_label(box) for box in (Box((0, 4), (8, 8)), Box((), ()))] == ["[0:8,4:8]", ""]

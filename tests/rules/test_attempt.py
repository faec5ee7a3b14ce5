"""One attempt's state machine: every (phase, event) pair, and the coverage check before a commit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rules.attempt import (
    TERMINAL,
    Announce,
    AppendAbort,
    AppendCommit,
    Appended,
    Attempt,
    DeadlinePassed,
    FencedOff,
    Finalize,
    FinalizeDone,
    FinalizeFailed,
    Phase,
    ReceiptRead,
    advance,
    uncovered,
)
from orchestrator.rules.records import Box, Failure, Receipt
from tests.support.builders import box, intent, leaf, receipt

NO = Failure(process=0, host="host-0", phase="write", cause="OSError: ENOSPC")
YES = ReceiptRead(receipt(boxes={"w": (box((0, 4)),)}))
EVENTS: dict[str, Any] = {
    "yes": YES,
    "no": ReceiptRead(receipt(failure=NO)),
    "hole": ReceiptRead(receipt(boxes={"w": (box((0, 3)),)})),
    "deadline": DeadlinePassed(600.0, {0: "host-0"}),
    "finalized": FinalizeDone(),
    "not finalized": FinalizeFailed(NO),
    "appended": Appended(),
    "fenced": FencedOff(9, "the successor"),
}
# What each event does in each phase; every pair that is not here changes nothing.
TABLE: dict[tuple[Phase, str], tuple[Phase, Any]] = {
    (Phase.OPEN, "yes"): (Phase.FINALIZING, Finalize()),
    (Phase.OPEN, "no"): (Phase.ABORTING, AppendAbort()),
    (Phase.OPEN, "hole"): (Phase.ABORTING, AppendAbort()),
    (Phase.OPEN, "deadline"): (Phase.ABORTING, AppendAbort()),
    (Phase.FINALIZING, "finalized"): (Phase.COMMITTING, AppendCommit()),
    (Phase.FINALIZING, "not finalized"): (Phase.ABORTING, AppendAbort()),
    (Phase.COMMITTING, "appended"): (Phase.COMMITTED, Announce()),
    (Phase.ABORTING, "appended"): (Phase.ABORTED, Announce()),
    (Phase.OPEN, "fenced"): (Phase.FENCED, Announce()),
    (Phase.FINALIZING, "fenced"): (Phase.FENCED, Announce()),
    (Phase.COMMITTING, "fenced"): (Phase.FENCED, Announce()),
    (Phase.ABORTING, "fenced"): (Phase.FENCED, Announce()),
}


@pytest.mark.parametrize(("phase", "event"), [(phase, event) for phase in Phase for event in EVENTS])
def test_every_event_in_every_phase(phase: Phase, event: str) -> None:
    before = Attempt(intent(), phase)
    after, effects = advance(before, EVENTS[event])
    wanted = TABLE.get((phase, event))
    if wanted:
        assert (after.phase, effects) == (wanted[0], (wanted[1],))
    else:
        assert (after, effects) == (before, ())


@given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=12))
def test_whatever_happens_a_decision_is_taken_once_and_for_good(names: list[str]) -> None:
    state, done, finalized = Attempt(intent()), [], False
    for name in names:
        ended = state.phase in TERMINAL
        following, effects = advance(state, EVENTS[name])
        assert not ended or (following, effects) == (state, ())
        finalized = finalized or (name == "finalized" and Finalize() in done)
        assert AppendCommit() not in effects or finalized, "a commit was asked for before the data was whole"
        done += effects
        state = following
    assert all(done.count(effect) <= 1 for effect in (Finalize(), AppendCommit(), AppendAbort(), Announce()))
    assert not (AppendCommit() in done and AppendAbort() in done)


def test_nothing_is_finalized_before_the_last_of_three_receipts_is_in() -> None:
    state = Attempt(intent(leaf(shape=(6,)), processes=3))
    for process in (2, 0):
        state, effects = advance(state, ReceiptRead(half(process)))
        assert effects == ()
    assert state.missing == (1,)
    state, effects = advance(state, ReceiptRead(half(1)))
    assert effects == (Finalize(),)


def half(process: int) -> Receipt:
    return receipt(process, boxes={"w": (box((2 * process, 2 * process + 2)),)})


def test_a_repeated_receipt_does_not_count_twice_and_the_first_stands() -> None:
    state, _ = advance(Attempt(intent(leaf(shape=(4,)), processes=2)), ReceiptRead(half(0)))
    again, effects = advance(state, ReceiptRead(receipt(0, failure=NO)))
    assert (again, effects) == (state, ())


def test_a_no_aborts_at_once_naming_process_host_and_cause() -> None:
    cause = Failure(process=2, host="host-2", phase="write", cause="OSError: ENOSPC")
    state, effects = advance(Attempt(intent(processes=4)), ReceiptRead(receipt(2, failure=cause)))
    assert effects == (AppendAbort(),)
    assert state.failures == (cause,)
    assert "process 2" in state.reason


def test_silent_processes_are_named_with_their_hosts_when_the_deadline_passes() -> None:
    state, _ = advance(Attempt(intent(processes=4)), ReceiptRead(half(1)))
    state, _ = advance(state, DeadlinePassed(600.0, {2: "host-b", 3: "host-d"}))
    assert state.reason == "step 100 e0001-a01: no receipt from processes [0, 2 (host-b), 3 (host-d)] after 600 s"
    assert [(failure.process, failure.host) for failure in state.failures] == [(0, "?"), (2, "host-b"), (3, "host-d")]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (receipt(0, step=99), "receipt of step 99 e0001-a01 found in step 100 e0001-a01"),
        (receipt(0, attempt="e0001-a02"), "receipt of step 100 e0001-a02 found in step 100 e0001-a01"),
        (receipt(7), "receipt of process 7, expected 0 to 1"),
    ],
)
def test_a_receipt_of_another_attempt_is_an_objection_not_a_promise(wrong: Receipt, said: str) -> None:
    state, effects = advance(Attempt(intent(processes=2)), ReceiptRead(wrong))
    assert effects == (AppendAbort(),)
    assert said in state.failures[0].cause


def test_being_fenced_says_by_whom() -> None:
    state, _ = advance(Attempt(intent()), FencedOff(9, "the successor"))
    assert state.reason == "fenced by epoch 9 (the successor)"


# Coverage.


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


def test_only_arrays_that_the_store_holds_need_a_cover_and_keys_are_covered_in_stored_shape() -> None:
    key = leaf("rng", (3,), "key", "key<fry>")
    key = type(key)(path=key.path, kind="key", shape=(3,), dtype=key.dtype, stored_shape=(3, 2), stored_dtype="uint32")
    tree = intent(leaf("lr", (), "float"), leaf("empty", (0, 4)), key, processes=1)
    assert uncovered(tree, {0: receipt(boxes={"rng": (box((0, 3), (0, 2)),)})}) == []
    assert uncovered(tree, {0: receipt(boxes={"rng": (box((0, 3)),)})}) != []


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that tile it: made by cutting the whole again and again."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = [Box(start=(0,) * len(shape), stop=shape)]
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

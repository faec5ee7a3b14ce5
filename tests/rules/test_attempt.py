"""One attempt's state machine: every pair of phase and event, and what a decided attempt says."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rules import attempt
from orchestrator.rules.attempt import (
    DECIDED,
    AppendAbort,
    AppendCommit,
    Appended,
    Attempt,
    DeadlinePassed,
    Effect,
    FencedOff,
    Finalize,
    FinalizeDone,
    FinalizeFailed,
    Phase,
    ReceiptsRead,
    UndefinedEvent,
    advance,
)
from orchestrator.rules.records import Cause, Failure, Receipt
from tests.support.builders import box, intent, leaf, receipt

VOTE = Failure(process=0, host="host-0", phase="write", cause="OSError: ENOSPC")
NOT_FINALIZED = Failure(process=0, host="host-0", phase="finalize", cause="OSError: EIO", kind=Cause.FINALIZE)
EVENTS: dict[str, Any] = {
    "all in": ReceiptsRead((receipt(boxes={"w": (box((0, 4)),)}),)),
    "abort vote": ReceiptsRead((receipt(failure=VOTE),)),
    "hole": ReceiptsRead((receipt(boxes={"w": (box((0, 3)),)}),)),
    "deadline": DeadlinePassed(600.0, {0: "host-0"}),
    "finalized": FinalizeDone(),
    "not finalized": FinalizeFailed(NOT_FINALIZED),
    "appended": Appended(),
    "fenced": FencedOff(9, "the successor"),
}
# What each event does in each phase.
TABLE: dict[tuple[Phase, str], tuple[Phase, Effect | None]] = {
    (Phase.OPEN, "all in"): (Phase.FINALIZING, Finalize()),
    (Phase.OPEN, "abort vote"): (Phase.ABORTING, AppendAbort()),
    (Phase.OPEN, "hole"): (Phase.ABORTING, AppendAbort()),
    (Phase.OPEN, "deadline"): (Phase.ABORTING, AppendAbort()),
    (Phase.FINALIZING, "finalized"): (Phase.COMMITTING, AppendCommit()),
    (Phase.FINALIZING, "not finalized"): (Phase.ABORTING, AppendAbort()),
    (Phase.COMMITTING, "appended"): (Phase.COMMITTED, None),
    (Phase.COMMITTING, "fenced"): (Phase.FENCED, None),
    (Phase.ABORTING, "appended"): (Phase.ABORTED, None),
    (Phase.ABORTING, "fenced"): (Phase.FENCED, None),
}
# Those that may come in any later phase too, and then change nothing. Every other pair is a mistake of the caller's.
LATE = ("all in", "abort vote", "hole", "deadline")


@pytest.mark.parametrize(("phase", "event"), [(phase, event) for phase in Phase for event in EVENTS])
def test_every_event_in_every_phase(phase: Phase, event: str) -> None:
    before = Attempt(intent(), phase)
    if (phase, event) in TABLE:
        after, effect = advance(before, EVENTS[event])
        assert (after.phase, effect) == TABLE[phase, event]
    elif event in LATE:
        assert advance(before, EVENTS[event]) == (before, None)
    else:
        with pytest.raises(UndefinedEvent, match=f"step 100 e0001-a01: {type(EVENTS[event]).__name__} while"):
            advance(before, EVENTS[event])


def test_the_tables_know_every_event_and_no_pair_twice() -> None:
    kinds = set(get_args(attempt.Event))
    assert {kind for _, kind in attempt._TABLE} == {type(event) for event in EVENTS.values()} == kinds
    assert not attempt._TABLE.keys() & attempt._LATE


@given(st.lists(st.sampled_from(sorted(EVENTS)), max_size=12))
def test_a_decision_is_taken_once_and_for_good(names: list[str]) -> None:
    state, asked, finalized = Attempt(intent()), list[Effect](), False
    for name in names:
        try:
            following, effect = advance(state, EVENTS[name])
        except UndefinedEvent:
            assert name not in LATE and (state.phase, name) not in TABLE
            continue
        assert state.phase not in DECIDED or (following, effect) == (state, None)
        finalized = finalized or name == "finalized"
        assert effect != AppendCommit() or finalized, "a commit was asked for before the data was whole"
        asked += [effect] if effect else []
        state = following
    assert all(asked.count(effect) <= 1 for effect in (Finalize(), AppendCommit(), AppendAbort()))
    assert not (AppendCommit() in asked and AppendAbort() in asked)


@pytest.mark.parametrize(
    ("events", "phase", "cause"),
    [
        (["all in", "finalized", "appended"], Phase.COMMITTED, None),
        (["abort vote", "appended"], Phase.ABORTED, Cause.REJECTED),
        (["hole", "appended"], Phase.ABORTED, Cause.INCOMPLETE),
        (["deadline", "appended"], Phase.ABORTED, Cause.SILENT),
        (["all in", "not finalized", "appended"], Phase.ABORTED, Cause.FINALIZE),
        (["all in", "finalized", "fenced"], Phase.FENCED, Cause.FENCED),
        (["deadline", "fenced"], Phase.FENCED, Cause.FENCED),
    ],
)
def test_a_decision_has_the_cause_that_decided_it(events: list[str], phase: Phase, cause: Cause | None) -> None:
    state = Attempt(intent())
    for name in events:
        state, _ = advance(state, EVENTS[name])
    assert (state.phase, state.cause) == (phase, cause)
    assert (state.reason == "") == (cause is None)


@pytest.mark.parametrize("kind", [Cause.REJECTED, Cause.HUNG, Cause.FENCED])
def test_an_abort_is_counted_as_the_vote_that_decides_it(kind: Cause) -> None:
    vote = Failure(process=1, host="host-1", phase="wait", cause="said no receipt from processes", kind=kind)
    state, _ = advance(Attempt(intent(processes=2)), ReceiptsRead((receipt(1, failure=vote),)))
    assert state.cause is kind


def test_nothing_is_finalized_before_the_last_receipt_is_in() -> None:
    state = Attempt(intent(leaf(shape=(6,)), processes=3))
    for process in (2, 0):
        state, effect = advance(state, ReceiptsRead((half(process),)))
        assert effect is None
    assert state.missing == (1,)
    state, effect = advance(state, ReceiptsRead((half(1),)))
    assert effect == Finalize()


def half(process: int) -> Receipt:
    return receipt(process, boxes={"w": (box((2 * process, 2 * process + 2)),)})


def test_several_receipts_at_once_are_as_good_as_one_after_the_other() -> None:
    before = Attempt(intent(leaf(shape=(6,)), processes=3))
    together = advance(before, ReceiptsRead((half(2), half(0), half(1))))
    state = before
    for process in (2, 0, 1):
        state, effect = advance(state, ReceiptsRead((half(process),)))
    assert together == (state, effect)


def test_a_repeated_receipt_does_not_count_twice_and_the_first_stands() -> None:
    state, _ = advance(Attempt(intent(leaf(shape=(4,)), processes=2)), ReceiptsRead((half(0),)))
    assert advance(state, ReceiptsRead((receipt(0, failure=VOTE),))) == (state, None)


def test_an_abort_vote_aborts_at_once_naming_process_host_and_cause() -> None:
    vote = Failure(process=2, host="host-2", phase="write", cause="OSError: ENOSPC")
    state, effect = advance(Attempt(intent(processes=4)), ReceiptsRead((receipt(2, failure=vote),)))
    assert effect == AppendAbort()
    assert state.failures == (vote,)
    assert state.reason == "process 2 voted to abort"


def test_silent_processes_are_named_with_their_hosts_when_the_deadline_passes() -> None:
    state, _ = advance(Attempt(intent(processes=4)), ReceiptsRead((half(1),)))
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
def test_a_receipt_of_another_attempt_aborts_and_is_no_promise(wrong: Receipt, said: str) -> None:
    state, effect = advance(Attempt(intent(processes=2)), ReceiptsRead((wrong,)))
    assert effect == AppendAbort()
    assert said in state.failures[0].cause


def test_being_fenced_says_by_whom() -> None:
    state, _ = advance(Attempt(intent(), Phase.COMMITTING), FencedOff(9, "the successor"))
    assert state.reason == "fenced by epoch 9 (the successor)"

"""What processes post to each other is validated before anybody goes by it: garbage is lost, or votes to abort."""

from __future__ import annotations

import pytest

from orchestrator.job.outcome import Aborted, Committed, Fenced, Outcome
from orchestrator.job.signals import Signals, abort_vote
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import Cause, Failure, Held, Receipt
from tests.support import builders
from tests.support.fakes import FakeBoard

ATTEMPT = AttemptId(7, builders.FIRST)
OTHER = AttemptId.of(7, 1, 2)
PREFIX = f"orchestrator/i/7/{builders.FIRST}/"
FAILURE = Failure(process=1, host="host-1", phase="write", cause="OSError: disk full")
ABORT = abort_vote(ATTEMPT, FAILURE)
HELD = (Held(1, ((1, 2),)), Held(2, None))


def text_of(receipt: Receipt) -> str:
    return encode(receipt).decode()


def posted(**values: str) -> Signals:
    """Signals as process 1 of two sees them, with `values` below the attempt: `receipt_0` is `receipt/0`."""
    board = FakeBoard(1, 2)
    board.posted = {PREFIX + name.replace("_", "/"): text for name, text in values.items()}
    return Signals(board, "i")


def test_votes_come_back_as_they_were_posted() -> None:
    board = FakeBoard(1, 2)
    signals = Signals(board, "i")
    assert signals.votes(ATTEMPT) == {}
    signals.vote(ATTEMPT)
    assert signals.votes(ATTEMPT) == {1: None} and signals.votes(OTHER) == {}
    signals.vote_abort(ABORT)
    assert signals.votes(ATTEMPT) == {1: ABORT}
    assert Signals(board, "an older incarnation").votes(ATTEMPT) == {}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "truncated or not a record"),
        ("no", "truncated or not a record"),
        ('{"failure": "disk full"}', "truncated or not a record"),
        (text_of(ABORT)[:-20], "truncated or not a record"),
        (text_of(ABORT).replace("disk full", "disk fuII"), "edited or damaged"),
        (text_of(abort_vote(OTHER, FAILURE)), "says it is attempt e0001-a02, expected e0001-a01"),
        (text_of(abort_vote(AttemptId(8, builders.FIRST), FAILURE)), "says it is step 8, expected 7"),
        (text_of(builders.receipt(1, step=7)), "a receipt without a failure"),
        (encode(builders.intent(step=7)).decode(), "not a Receipt"),
        ("\ud800", "truncated or not a record"),
    ],
)
def test_a_vote_that_makes_no_sense_counts_as_one_to_abort(text: str, cause: str) -> None:
    vote = posted(receipt_1=text).votes(ATTEMPT)[1]
    assert vote is not None and vote.failure is not None
    assert (vote.step, vote.attempt, vote.process, vote.host) == (*ATTEMPT, 1, "host-1")
    assert vote.failure.phase == "receipt" and cause in vote.failure.cause
    assert "signal of process 1" in vote.failure.cause


def test_a_vote_in_anothers_name_counts_as_that_processs_abort_vote() -> None:
    vote = posted(receipt_0=text_of(ABORT)).votes(ATTEMPT)[0]
    assert vote and vote.failure and vote.process == 0
    assert "says it is process 1, expected 0" in vote.failure.cause


@pytest.mark.parametrize("name", ["2", "-1", "x", "1x", "", "00000000000000000000"])
def test_a_vote_of_nobody_is_not_counted(name: str) -> None:
    votes = posted(**{f"receipt_{name}": "yes", "receipt_1": "yes"}).votes(ATTEMPT)
    assert votes == {1: None}


@pytest.mark.parametrize(
    "outcome", [Committed(), Aborted("process 1 voted to abort", Cause.HUNG), Fenced("fenced by epoch 9 (w)")]
)
def test_a_decision_comes_back_as_it_was_posted(outcome: Outcome) -> None:
    board = FakeBoard(0, 2)
    assert Signals(board, "i").decision(ATTEMPT) is None
    Signals(board, "i").post_decision(ATTEMPT, outcome)
    assert Signals(board, "i").decision(ATTEMPT) == outcome


def test_what_process_0_measured_is_not_posted() -> None:
    board = FakeBoard(0, 2)
    Signals(board, "i").post_decision(ATTEMPT, Committed(state_bytes=7, stage_s=1.0))
    assert Signals(board, "i").decision(ATTEMPT) == Committed()


GARBAGE = [
    *("", "no", "null", "{}", "[]", "{", '"', "[" * 100_000, '{"outcome":"saved"}', '{"outcome":"aborted"}'),
    *('{"outcome":"aborted","reason":7}', '{"phase":"COMMITTED","reason":""}', '[1,"e0001-a01"', '["1","e0001-a01"]'),
    *('[-1,"e0001-a01"]', '[1,"../.."]', '[1,"e1-a1"]', '[3000000000,"e0001-a01"]', "[[0,null,null]]", '[["1"]]'),
    *("[[1,[[2,1]],null]]", "[[1,[[0,3]],null]]", "[[1,null,[0]]]", "[[1000000000000,null,null]]", "\ud800"),
]


@pytest.mark.parametrize("text", GARBAGE, ids=[text[:40].encode(errors="replace").decode() for text in GARBAGE])
def test_garbage_of_process_0_is_taken_as_lost(text: str) -> None:
    board = FakeBoard(1, 2)
    signals = Signals(board, "i")
    board.posted = {f"{PREFIX}decision/0": text, f"{PREFIX}held/0": text, "orchestrator/i/saving/0": text}
    assert signals.decision(ATTEMPT) is None
    assert signals.held(ATTEMPT) in (None, ())
    assert signals.saving() is None


def test_process_0_says_which_attempt_it_saves_and_who_holds_the_leaves() -> None:
    signals = Signals(FakeBoard(0, 2), "i")
    assert signals.saving() is None and signals.held(ATTEMPT) is None
    signals.post_saving(ATTEMPT)
    signals.post_held(ATTEMPT, HELD)
    assert signals.saving() == ATTEMPT and signals.held(ATTEMPT) == HELD
    assert signals.held(OTHER) is None


def test_what_was_posted_of_an_attempt_is_forgotten_when_the_next_is_decided() -> None:
    board = FakeBoard(0, 2)
    signals = Signals(board, "i")
    for attempt in (ATTEMPT, OTHER):
        signals.vote(attempt)
        signals.forget_previous(attempt)
        assert signals.votes(attempt) == {0: None}
        signals.post_decision(attempt, Committed())
    assert signals.votes(ATTEMPT) == {} and signals.decision(ATTEMPT) is None
    assert signals.decision(OTHER) == Committed()

"""What all processes make of their reports: one table, the same on each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

import orchestrator as oc
from orchestrator import errors
from orchestrator.job.restore_rounds import (
    Done,
    Exchange,
    Failed,
    Failure,
    Finding,
    Read,
    Report,
    attempt,
    finding,
    judge,
    report,
)

DONE, MINE, OTHER = Done(), Exchange("aa"), Exchange("bb")
DAMAGED, UNSAFE = Failure("Damaged", ""), Failure("UnsafeKey", "")
RETIRED, MISMATCH = Failure("StepRetired", ""), Failure("Mismatch", "")
UNAVAILABLE, NEWER = Failure("Unavailable", ""), Failure("NewerFormat", "")

TABLE: list[tuple[list[Report], Finding, int]] = [
    ([DONE], Finding.DONE, 0),
    ([DONE, DONE, DONE], Finding.DONE, 0),
    ([DONE, DAMAGED], Finding.DAMAGED, 1),
    ([UNSAFE, DAMAGED], Finding.DAMAGED, 0),
    ([DONE, UNAVAILABLE], Finding.UNREADABLE, 1),
    ([DAMAGED, UNAVAILABLE], Finding.UNREADABLE, 1),  # it has not been able to say whether it is damaged
    ([DAMAGED, RETIRED], Finding.RETIRED, 1),
    ([UNAVAILABLE, RETIRED], Finding.RETIRED, 1),
    ([RETIRED, DAMAGED, MISMATCH], Finding.FAULT, 2),
    ([DAMAGED, UNAVAILABLE, NEWER, MISMATCH], Finding.FAULT, 2),
    ([MINE, MINE], Finding.OTHER_ARRAYS, 0),  # nobody asks for a judgement of equal ones: see `_load_once`
    ([MINE, OTHER], Finding.OTHER_ARRAYS, 0),
    ([DONE, MINE], Finding.OTHER_ARRAYS, 1),
    ([MINE, DAMAGED], Finding.DAMAGED, 1),
    ([DONE, MINE, UNAVAILABLE], Finding.UNREADABLE, 2),
]


@pytest.mark.parametrize(("reports", "expected", "process"), TABLE)
def test_the_reports_of_all_are_judged_by_one_table(reports: list[Report], expected: Finding, process: int) -> None:
    assert judge(reports) == (expected, process)


def test_nothing_is_damaged_or_done_as_long_as_another_process_says_otherwise() -> None:
    kinds = [DONE, MINE, OTHER, DAMAGED, UNSAFE, RETIRED, MISMATCH, UNAVAILABLE, NEWER]
    for reports in itertools.product(kinds, repeat=3):
        found, process = judge(reports)
        findings = {finding(one) for one in reports}
        assert finding(reports[process]) is found, reports
        assert found is not Finding.DONE or findings == {Finding.DONE}
        assert found is not Finding.DAMAGED or not findings & {Finding.UNREADABLE, Finding.RETIRED, Finding.FAULT}
        assert {judge(order)[0] for order in itertools.permutations(reports)} == {found}, "whoever comes first"


def test_every_error_of_ours_is_either_about_the_step_or_a_fault() -> None:
    about_steps = {
        **dict.fromkeys(["Damaged", "UnsafeKey"], Finding.DAMAGED),
        **dict.fromkeys(["StorageError", "Unavailable", "OutcomeUnknown"], Finding.UNREADABLE),
        "StepRetired": Finding.RETIRED,
    }
    names = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert about_steps.keys() < set(names)
    for name in [*names, "KeyError", "MemoryError", ""]:
        assert finding(Failure(name, "")) is about_steps.get(name, Finding.FAULT), name


def raises(error: Exception) -> Callable[[], Any]:
    def read() -> Any:
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "reported"),
    [
        (lambda: [1, 2], DONE),
        (
            raises(oc.Damaged("w", files=["state/d/1"], chunks=["w/c/0"])),
            Failure("Damaged", "w", ("state/d/1",), ("w/c/0",)),
        ),
        (raises(errors.Suspect("w", files=["state/d/1"])), Failure("Suspect", "w")),
        (
            raises(oc.Mismatch("here", ["w: other"])),
            Failure("Mismatch", "here: 1 leaves do not fit the target\n  w: other"),
        ),
        (raises(KeyError("w")), Failure("KeyError", "'w'")),
    ],
    ids=["read", "damaged", "suspect", "mismatch", "bug"],
)
def test_what_one_process_has_made_of_a_step_is_a_value_first(read: Callable[[], Any], reported: Report) -> None:
    outcome = attempt(read)
    assert isinstance(outcome, Read if reported == DONE else Failed)
    assert report(outcome) == reported


def test_ctrl_c_is_no_outcome() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(raises(KeyboardInterrupt()))  # type: ignore[arg-type]

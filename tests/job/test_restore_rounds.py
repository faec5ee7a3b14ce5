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
    NotRead,
    Read,
    ReadFailure,
    Report,
    Ruling,
    report,
    result_of,
    rule_on,
    ruling,
)

DONE, MINE, OTHER = Done(), Exchange("aa"), Exchange("bb")
DAMAGED, UNSAFE = ReadFailure("Damaged", ""), ReadFailure("UnsafeKey", "")
RETIRED, MISMATCH = ReadFailure("StepRetired", ""), ReadFailure("Mismatch", "")
UNAVAILABLE, NEWER = ReadFailure("Unavailable", ""), ReadFailure("NewerFormat", "")

TABLE: list[tuple[list[Report], Ruling, int]] = [
    ([DONE], Ruling.DONE, 0),
    ([DONE, DONE, DONE], Ruling.DONE, 0),
    ([DONE, DAMAGED], Ruling.DAMAGED, 1),
    ([UNSAFE, DAMAGED], Ruling.DAMAGED, 0),
    ([DONE, UNAVAILABLE], Ruling.UNREADABLE, 1),
    ([DAMAGED, UNAVAILABLE], Ruling.UNREADABLE, 1),  # it has not been able to say whether it is damaged
    ([DAMAGED, RETIRED], Ruling.RETIRED, 1),
    ([UNAVAILABLE, RETIRED], Ruling.RETIRED, 1),
    ([RETIRED, DAMAGED, MISMATCH], Ruling.FAULT, 2),
    ([DAMAGED, UNAVAILABLE, NEWER, MISMATCH], Ruling.FAULT, 2),
    ([MINE, MINE], Ruling.OTHER_ARRAYS, 0),  # nobody asks for a judgement of equal ones: see `_load_once`
    ([MINE, OTHER], Ruling.OTHER_ARRAYS, 0),
    ([DONE, MINE], Ruling.OTHER_ARRAYS, 1),
    ([MINE, DAMAGED], Ruling.DAMAGED, 1),
    ([DONE, MINE, UNAVAILABLE], Ruling.UNREADABLE, 2),
]


@pytest.mark.parametrize(("reports", "expected", "process"), TABLE)
def test_the_reports_of_all_are_ruled_on_by_one_table(reports: list[Report], expected: Ruling, process: int) -> None:
    assert rule_on(reports) == (expected, process)


def test_nothing_is_damaged_or_done_as_long_as_another_process_says_otherwise() -> None:
    kinds = [DONE, MINE, OTHER, DAMAGED, UNSAFE, RETIRED, MISMATCH, UNAVAILABLE, NEWER]
    for reports in itertools.product(kinds, repeat=3):
        found, process = rule_on(reports)
        rulings = {ruling(one) for one in reports}
        assert ruling(reports[process]) is found, reports
        assert found is not Ruling.DONE or rulings == {Ruling.DONE}
        assert found is not Ruling.DAMAGED or not rulings & {Ruling.UNREADABLE, Ruling.RETIRED, Ruling.FAULT}
        assert {rule_on(order)[0] for order in itertools.permutations(reports)} == {found}, "whoever comes first"


def test_every_error_of_ours_is_either_about_the_step_or_a_fault() -> None:
    about_steps = {
        **dict.fromkeys(["Damaged", "UnsafeKey"], Ruling.DAMAGED),
        **dict.fromkeys(["StorageError", "Unavailable", "OutcomeUnknown"], Ruling.UNREADABLE),
        "StepRetired": Ruling.RETIRED,
    }
    names = [name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert about_steps.keys() < set(names)
    for name in [*names, "KeyError", "MemoryError", ""]:
        assert ruling(ReadFailure(name, "")) is about_steps.get(name, Ruling.FAULT), name


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
            ReadFailure("Damaged", "w", ("state/d/1",), ("w/c/0",)),
        ),
        (raises(errors.Suspect("w", files=["state/d/1"])), ReadFailure("Suspect", "w")),
        (
            raises(oc.Mismatch("here", ["w: other"])),
            ReadFailure("Mismatch", "here: 1 leaves do not fit the target\n  w: other"),
        ),
        (raises(KeyError("w")), ReadFailure("KeyError", "'w'")),
    ],
    ids=["read", "damaged", "suspect", "mismatch", "bug"],
)
def test_what_one_process_has_made_of_a_step_is_a_value_first(read: Callable[[], Any], reported: Report) -> None:
    outcome = result_of(read)
    assert isinstance(outcome, Read if reported == DONE else NotRead)
    assert report(outcome) == reported


def test_ctrl_c_is_no_outcome() -> None:
    with pytest.raises(KeyboardInterrupt):
        result_of(raises(KeyboardInterrupt()))  # type: ignore[arg-type]

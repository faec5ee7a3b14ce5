"""What each error ends a process with, and what others are told of it."""

from __future__ import annotations

import pytest

import orchestrator as oc
from orchestrator.job.exit_codes import TEXT_CHARS_MAX, describe, exit_code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 1),
        (oc.UsageError("x"), 2),
        (oc.NotARun("x"), 3),
        (oc.Damaged("x"), 4),
        (oc.RootChanged("x"), 5),
        (oc.NothingToRestore("x"), 6),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (SystemExit(-1), 255),
        (SystemExit("text"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no data"), "ValueError: no data"),
        (ValueError(), "ValueError"),
        (Unspeakable(), "Unspeakable"),
        (SystemExit("no data"), "sys.exit('no data')"),
        (ValueError("x" * 5000), f"ValueError: {'x' * 5000}"[:TEXT_CHARS_MAX]),
    ],
    ids=["words", "no words", "raises", "sys.exit", "long"],
)
def test_an_error_is_described_shortly_whatever_it_is(error: BaseException, text: str) -> None:
    assert describe(error) == text

"""What is kept for an object is kept for that one only."""

from __future__ import annotations

import pytest

from orchestrator.rules.kept import kept


def test_a_result_is_kept_for_the_very_object_and_not_for_an_equal_one() -> None:
    calls: list[tuple[int, ...]] = []

    @kept
    def size(given: tuple[int, ...]) -> int:
        calls.append(given)
        return len(given)

    one, equal = tuple([1, 2]), tuple([1, 2])
    assert [size(one), size(one), size(equal), size(one)] == [2, 2, 2, 2]
    assert len(calls) == 2


def test_what_was_raised_is_raised_again_and_what_is_kept_is_bounded() -> None:
    calls = 0

    @kept
    def positive(given: tuple[int]) -> int:
        nonlocal calls
        calls += 1
        if given[0] < 0:
            raise ValueError("negative")
        return given[0]

    bad, good = (-1,), [(number,) for number in range(6)]
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            positive(bad)
    assert calls == 2
    for one in good:
        assert positive(one) == one[0]
    assert positive(good[-1]) == 5 and calls == 8
    assert positive(good[0]) == 0 and calls == 9  # forgotten

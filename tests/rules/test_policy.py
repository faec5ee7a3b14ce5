"""When to save and what to keep."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.policy import (
    METRICS_BYTES_MAX,
    METRICS_MAX,
    at,
    best,
    carried,
    every,
    every_nth,
    every_seconds,
    lacking,
    last,
    needed,
    within,
)
from orchestrator.rules.json_numbers import stored

NAN = float("nan")


@dataclass(frozen=True)
class Kept:
    step: int
    time: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def due_steps(policy: Any, until: int = 12) -> list[int]:
    return [step for step in range(until) if policy.due(step, None)]


def test_every_n_is_due_at_multiples_of_n_step_0_included() -> None:
    assert due_steps(every(5)) == [0, 5, 10]
    assert due_steps(every(1), 3) == [0, 1, 2]


def test_at_is_due_at_exactly_its_steps() -> None:
    assert due_steps(at([3, 7, 7])) == [3, 7]
    assert due_steps(at(step for step in (1, 2))) == [1, 2]


def test_every_seconds_is_due_before_the_first_save_and_when_the_time_has_passed() -> None:
    policy = every_seconds(10)
    assert [policy.due(1, elapsed) for elapsed in (None, 0.0, 9.99, 10.0, 11.0)] == [True, False, False, True, True]


def test_save_policies_combined_are_due_when_any_is_and_timed_if_any_is() -> None:
    assert due_steps(every(5) | at([3]) | at([4])) == [0, 3, 4, 5, 10]
    assert not (every(5) | at([3])).timed
    for one, other in itertools.permutations([every(5), at([3]), every_seconds(1)], 2):
        assert (one | other).timed == (one.timed or other.timed)
    assert (every(5) | at([3]) | every_seconds(9)).timed


def kept(policy: Any, steps: list[Any], now: float = 0.0) -> list[int]:
    return sorted(policy.keep(steps, now))


def test_last_n_counts_in_commit_order_not_by_number() -> None:
    assert kept(last(2), [Kept(100), Kept(50), Kept(60)]) == [50, 60]
    assert kept(last(9), [Kept(1)]) == [1]
    assert kept(last(1), []) == []


def test_every_nth_keeps_multiples_forever() -> None:
    assert kept(every_nth(100), [Kept(0), Kept(99), Kept(100), Kept(250), Kept(300)]) == [0, 100, 300]


def test_within_keeps_what_was_committed_in_the_last_seconds() -> None:
    steps = [Kept(1, time=100.0), Kept(2, time=140.0), Kept(3, time=150.0)]
    assert kept(within(10), steps, now=150.0) == [2, 3]


def losses(*values: float | None) -> list[Kept]:
    return [Kept(step, metrics={} if value is None else {"loss": value}) for step, value in enumerate(values)]


def test_best_ranks_by_metric_in_both_directions() -> None:
    steps = losses(0.5, 0.1, 0.9, 0.2)
    assert kept(best("loss"), steps) == [1]
    assert kept(best("loss", 2), steps) == [1, 3]
    assert kept(best("loss", 2, mode="max"), steps) == [0, 2]


@pytest.mark.parametrize(
    ("keep", "values", "left"),
    [
        (best("loss"), [], []),
        (best("loss"), [None, None, None], [0, 1, 2]),
        (best("accuracy", 2), [0.5, 0.1, 0.9], [0, 1, 2]),  # another name than was given
        (best("loss") | last(1), [None, None, None], [0, 1, 2]),
        (best("accuracy") | best("loss"), [0.5, 0.1], [0, 1]),
        (best("loss"), [None, None, 0.5], [2]),  # one has it: the others are not the best
        (best("loss"), [0.5, None, None], [0]),
        (best("loss") | last(1), [0.5, 0.7, None, None], [0, 3]),
        (best("loss", 2), [NAN, NAN, NAN], [1, 2]),  # known, and no number: as many as were asked for, and no more
        (best("loss", 1), [NAN, None, NAN, None], [1, 2, 3]),
        (best("loss", 2), [NAN, None, 0.5, NAN], [2]),
        (best("loss", mode="max"), [float("inf"), 1.0], [0]),  # a number like others
        (best("loss", 2), [float("inf"), float("-inf"), NAN], [0, 1]),
    ],
)
def test_as_long_as_no_step_has_the_metric_best_retires_none_of_those_without(
    keep: Any, values: list[float | None], left: list[int]
) -> None:
    assert kept(keep, losses(*values)) == left


@pytest.mark.parametrize(
    ("keep", "given", "said"),
    [
        (None, {}, ""),
        (last(2) | every_nth(3), {}, ""),
        (best("loss"), {"loss": NAN}, ""),
        (last(1) | best("loss"), {"loss": 1.0, "accuracy": 1.0}, ""),
        (best("val_loss"), {"loss": 1.0, "lr": 1.0}, "goes by the metric 'val_loss', which this save does not have; "),
        (best("val_loss"), {"loss": 1.0, "lr": 1.0}, "its metrics: 'loss', 'lr'."),
        (best("val_loss"), {}, "its metrics: none."),
        (last(1) | (best("b") | best("a")), {"c": 1.0}, "goes by the metric 'a', 'b', which"),
        (best("b"), {f"m{number:02}": 0.0 for number in range(30)}, "'m18', 'm19' and 10 more."),
    ],
)
def test_a_save_without_the_metric_that_decides_is_named_with_what_it_has(
    keep: Any, given: dict[str, float], said: str
) -> None:
    told = lacking(keep, given)
    assert said in told and bool(told) == bool(said)


@given(st.permutations([0.5, NAN, 0.1, None, NAN, 0.9]))
def test_nan_and_missing_metrics_are_never_best_wherever_they_stand(values: list[float | None]) -> None:
    assert kept(best("loss", 1), losses(*values)) == [values.index(0.1)]
    assert kept(best("loss", 1, mode="max"), losses(*values)) == [values.index(0.9)]
    assert kept(best("loss", 9), losses(*values)) == sorted(values.index(value) for value in (0.1, 0.5, 0.9))


STEPS = st.lists(st.builds(Kept, st.integers(0, 50), st.floats(0, 100)), unique_by=lambda entry: entry.step)
KEEPS = st.sampled_from([last(2), every_nth(3), best("loss"), within(20)])


@given(STEPS, KEEPS, KEEPS, KEEPS)
def test_keep_policies_combined_keep_the_union_and_invent_no_step(
    steps: list[Kept], one: Any, other: Any, third: Any
) -> None:
    union = one.keep(steps, 50.0) | other.keep(steps, 50.0)
    assert (one | other).keep(steps, 50.0) == union == (other | one).keep(steps, 50.0)
    assert (one | other | third).keep(steps, 50.0) == union | third.keep(steps, 50.0)
    assert union <= {entry.step for entry in steps}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: every(0), "every: n=0: expected a whole number of at least 1"),
        (lambda: last(0), "last: n=0: expected a whole number of at least 1"),
        (lambda: every_nth(-3), "every_nth: n=-3: expected a whole number of at least 1"),
        (lambda: best("loss", 0), "best: n=0: expected a whole number of at least 1"),
        (lambda: every_seconds(0), "every_seconds: seconds=0: expected a positive number of seconds, at most 1000000"),
        (lambda: best("\ud800"), "best: metric='\\ud800': expected a metric's name"),
        (lambda: best("loss", mode="low"), "best: mode='low': expected 'min' or 'max'"),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_makes_no_sense_is_rejected_when_it_is_made(make: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == said


# What a head carries of a step's metrics.

MANY = {f"m{number}": float(number) for number in range(1000)}


class Own:
    """A policy that does not say what it looks at."""

    def keep(self, steps: Any, now: float) -> frozenset[int]:
        return frozenset()


class Telling(Own):
    def metrics_needed(self, metrics: Any) -> frozenset[str]:
        return frozenset({"m998", "absent"})


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        (None, set()),
        (last(3), set()),
        (every_nth(3) | within(5), set()),
        (best("m999"), {"m999"}),
        (last(3) | (best("m999") | best("absent", mode="max")), {"m999", "absent"}),
        (Telling(), {"m998", "absent"}),
        (last(1) | Telling(), {"m998", "absent"}),
        (Own(), None),
        (last(1) | Own(), None),
    ],
    ids=["none", "last", "both", "best", "nested", "telling", "last and telling", "own", "last and own"],
)
def test_a_head_carries_what_the_policy_judges_by_and_then_the_first(keep: Any, names: set[str] | None) -> None:
    assert needed(keep, MANY) == names
    few = carried(MANY, keep)
    if names is None:
        assert few == MANY
        return
    first = [name for name in MANY if name not in names][: METRICS_MAX - len(names & MANY.keys())]
    assert list(few) == [name for name in MANY if name in names or name in first]
    assert len(few) == METRICS_MAX and few.items() <= MANY.items()


@given(st.dictionaries(st.text(max_size=300), st.floats(), max_size=80), st.text(max_size=5))
def test_what_is_carried_is_bounded_in_bytes_but_for_what_decides(metrics: dict[str, float], name: str) -> None:
    few = carried(metrics, best(name))
    assert (name in few) == (name in metrics)
    others = {each: stored(value) for each, value in few.items() if each != name}
    assert len(json.dumps(others, ensure_ascii=False).encode()) <= METRICS_BYTES_MAX
    if len(metrics) <= 10 and all(len(each) <= 20 for each in metrics):
        assert few == metrics

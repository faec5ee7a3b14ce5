"""What hosts were given, in words that can be compared, and what they may differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.job import startup
from orchestrator.rules import configuration
from orchestrator.rules.configuration import OPTIONS, RULES, Strictness, described, differences, digest, of_agent, who


def test_every_option_has_a_rule_and_nothing_else_has() -> None:
    assert [field.name for field in fields(oc.Options)] == list(OPTIONS)
    own = {name for name, rule in OPTIONS.items() if rule is Strictness.OWN}
    assert of_agent(None, None, oc.Options()).keys() == {"save", "keep", "tiers"} | {
        f"Options.{n}" for n in OPTIONS.keys() - own
    }
    assert startup.surroundings().keys() <= RULES.keys()
    assert {*configuration.PACKAGES, *configuration.JAX_SETTINGS, *configuration.ENVIRONMENT} <= RULES.keys()


class Own:
    """A policy of the user's own; `made` differs from host to host."""

    def __init__(self, made: object) -> None:
        self.made = made

    def keep(self, steps: Any, now: float) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class OwnValue(Own):
    made: object
    score: Callable[[Any], float] = len

    def __or__(self, other: Any) -> Any: ...


ONE_AND_THE_SAME: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "every": lambda: oc.every(3),
    "at": lambda: oc.at([*range(100, 0, -1), 10**6]),
    "at, too long": lambda: oc.at(range(1000)),
    "combined": lambda: oc.every(3) | oc.every_seconds(2) | oc.auto(60),
    "kept": lambda: oc.last(2) | oc.best("loss", 2) | oc.within(3) | oc.every_nth(4),
    "own": lambda: Own(object()),
    "own, combined": lambda: oc.last(1) | Own(object()),
    "own value": lambda: OwnValue(3, lambda found: 0.0),
    "function": lambda: lambda step: True,
    "partial": lambda: partial(print, object()),
    "nested": lambda: {"b": {2, "x", None}, "a": [object(), (1, 2.5)]},
}


@pytest.mark.parametrize("what", ONE_AND_THE_SAME)
def test_what_was_made_alike_is_described_alike_and_shortly(what: str) -> None:
    one, other = (described(ONE_AND_THE_SAME[what]()) for _ in range(2))
    assert one == other and len(one) <= configuration.TEXT_CHARS and "0x" not in one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (oc.every(3), oc.every(4)),
        (oc.every(3), oc.every_seconds(3)),
        (oc.every(3), None),
        (oc.at(range(1000)), oc.at(range(1001))),
        (oc.at(range(1000)), oc.at([*range(998), 5000, 5001])),
        (oc.every(3) | oc.at([1]), oc.every(3) | oc.at([2])),
        (oc.best("loss"), oc.best("loss", mode="max")),
        (oc.last(2) | oc.best("loss"), oc.last(2) | oc.best("val_loss")),
        (OwnValue(3), OwnValue(4)),
        (Own(1), OwnValue(1)),
        (60.0, None),
        (True, "True"),
    ],
)
def test_what_was_made_otherwise_is_described_otherwise(one: object, other: object) -> None:
    assert described(one) != described(other)
    assert digest({"save": described(one)}) != digest({"save": described(other)})


def test_differences_are_listed_by_rule_with_process_0_first_and_the_first_of_many() -> None:
    told = [{"save": "a", "jax": "1", "numpy": "2", "Options.attest": "'off'"} for _ in range(40)]
    assert differences(told, partial(who, {})) == ([], [])
    for process in range(1, 40):
        told[process]["save"] = "b"
    told[7] |= {"jax": "2", "Options.attest": "'full'", "of a later version": "1"}
    errors, notes = differences(told, partial(who, {process: f"h{process}" for process in range(40)}))
    some = "1 (h1), 2 (h2), 3 (h3), 4 (h4), 5 (h5), 6 (h6), 7 (h7), 8 (h8) and 31 more"
    assert errors[0] == f"save: a on process 0 (h0); b on processes {some}"
    assert errors[1].endswith("; 'full' on process 7 (h7)") and len(errors) == 2
    assert [note.partition(":")[0] for note in notes] == ["jax", "of a later version"]
    assert notes[1].startswith("of a later version: not known on processes 0 (h0), 1 (h1)")


def test_options_that_are_each_hosts_own_are_not_compared() -> None:
    mine = oc.Options(events_dir="a", metrics_port=1, metrics_address="::1", metrics_file="m", traces=True)
    assert of_agent(None, None, mine) == of_agent(None, None, oc.Options())

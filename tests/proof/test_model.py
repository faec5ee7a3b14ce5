"""Every interleaving of the shipped rules keeps the invariants, and the checker notices when one is broken."""

from __future__ import annotations

import pytest

from tests.proof.model.mutations import MUTATIONS, Mutation
from tests.proof.model.scenarios import SCENARIOS
from tests.proof.model.search import Scenario, explore

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
# A change that makes the model smaller must say so here: a search of nothing finds nothing.
STATES_AT_LEAST = {
    "rivals": 190_000,
    "three rivals": 69_000,
    "processes": 85_000,
    "rival processes": 15_000,
    "groups": 30_000,
    "commands": 27_000,
    "gc": 115_000,
    "strangers": 8_000,
    "broken copy": 7_000,
    "evidence": 33_000,
    "by name": 9_500,
    "unread": 350,
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_interleaving_breaks_an_invariant(scenario: Scenario) -> None:
    result = explore(scenario)
    print(f"{scenario.name}: {result.states} states, {result.moves} moves, {result.images} crash images")
    assert result.violation is None, f"\n{result.violation}"
    assert result.states >= STATES_AT_LEAST[scenario.name]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_of_the_rules_is_caught(mutation: Mutation) -> None:
    found = explore(BY_NAME[mutation.scenario], mutation.rules()).violation
    assert found is not None, "no invariant was broken"
    assert found.problems[0].startswith(f"{mutation.caught_by}:"), f"\n{found}"


def test_there_are_enough_mutations() -> None:
    print(f"mutations killed: {len(MUTATIONS)}")
    assert len(MUTATIONS) >= 12

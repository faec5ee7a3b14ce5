"""Every interleaving of jobs on several hosts, with copies: what is restored is what was held, and the newest of it."""

from __future__ import annotations

import pytest

from tests.proof.model.host_scenarios import MUTATIONS, SCENARIOS, Mutation
from tests.proof.model.hosts import explore

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
STATES_AT_LEAST = 80_000  # of all together: a search of nothing finds nothing


def test_no_interleaving_breaks_a_promise() -> None:
    states = 0
    for scenario in SCENARIOS:
        found = explore(scenario)
        print(f"{scenario.name}: {found.states} states, {found.choices} choices")
        assert found.violation is None, "\n".join([found.violation or "", *found.trace])
        assert found.choices > 1, scenario.name
        states += found.states
    assert states >= STATES_AT_LEAST


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_caught(mutation: Mutation) -> None:
    found = explore(BY_NAME[mutation.scenario], mutation.rules())
    assert mutation.caught in (found.violation or ""), found.violation

"""Every interleaving of incarnations that hold steps: nobody comes back on what a newer one has left behind."""

from __future__ import annotations

from types import ModuleType

import pytest

from orchestrator.rules import held, journal
from tests.proof.model.mutations import mutated
from tests.proof.model.tiers import Rules, explore

SCENARIOS = ((2, 2), (1, 1, 1), (2, 1, 0))  # how many steps each incarnation holds


@pytest.mark.parametrize(("holds", "states"), [((3, 3), 8_000), ((1, 1, 1), 11_000), ((2, 1, 0), 25_000)])
def test_no_interleaving_has_a_step_chosen_over_a_newer_incarnations(holds: tuple[int, ...], states: int) -> None:
    found = explore(holds)
    print(f"{holds}: {found.states} states, {found.choices} choices")
    assert found.violation is None and found.states >= states


@pytest.mark.parametrize(
    ("rule", "name", "module", "old", "new", "caught"),
    [
        ("candidates", "candidates", held, "rank(one.id), one.manifest", "one.step, one.manifest", "newer incarnation"),
        ("candidates", "candidates", held, ".intersection(*offers[1:])", ".union(*offers[1:])", "not all can have it"),
        ("candidates", "candidates", held, "if journalled.admits(one.id)", "", "is newer"),
        ("candidates", "candidates", held, "reverse=True)\n\n\ndef superseded", ")\n\n\ndef superseded", "is newer"),
        ("open_tier", "open_epoch", held, "head.epoch >= epoch:", "head.epoch == epoch:", "is followed by"),
        (
            "enter",
            "commit",
            journal,
            "head is None or head.epoch != epoch:\n        return _not_our_epoch(head, epoch)\n    if is_live",
            "head is None:\n        return None\n    if is_live",
            "that epoch",
        ),
        ("follow", "follow", held, "head is None or head.epoch != epoch:", "head is None:", "changes a tier"),
        (
            "release",
            "release",
            held,
            "head.epoch > epoch:\n        return FencedBy(head.epoch, head.writer)\n    gone =",
            "False:\n        return FencedBy(head.epoch, head.writer)\n    gone =",
            "releases a step in epoch",
        ),
    ],
)
def test_a_mutation_of_the_rules_is_caught(
    rule: str, name: str, module: ModuleType, old: str, new: str, caught: str
) -> None:
    rules = Rules(**{rule: mutated(module, old, new)[name]})
    violations = [explore(holds, rules).violation or "" for holds in SCENARIOS]
    assert any(caught in violation for violation in violations), violations

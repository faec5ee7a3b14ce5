"""Every loss of small jobs is survived or not as the rule says, and the page says what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.rules import survival
from tests.proof.survival import BEGIN, END, Layout, Placed, Wrong, layouts, table, try_all

PAGE = Path(__file__).parents[2] / "docs" / "tiers.md"


def test_the_rule_is_right_about_every_loss_of_small_jobs() -> None:
    tried = [try_all(layout) for layout in layouts(8)]
    print(f"{len(tried)} layouts, {sum(tried)} losses")
    assert len(tried) > 200 and sum(tried) > 20_000


def test_the_page_says_what_the_command_prints() -> None:
    assert table() in PAGE.read_text().split(BEGIN)[1].split(END)[0]


def test_a_rule_that_promises_too_much_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = Placed(Layout((2, 2), 1))
    monkeypatch.setattr(survival, "survives", lambda targets, lost: len(set(lost)) < 3)
    assert placed.survives([0]) and placed.survives([0, 1])  # a domain
    taker = placed.targets[0][0]
    with pytest.raises(Wrong, match=f"\\[0, {taker}\\] are lost: the rule says True, expected False"):
        placed.survives([0, taker])

"""The table of goals: figures are found in what benchmarks print, and a goal that was not measured stays a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import goal_table, quick, report

DOCS = Path(__file__).parents[2] / "docs"
LINES = [
    {"figure": "lost", "peer": "ours", "lost": 21.0},
    {"figure": "lost", "peer": "ours", "lost": 9.0},
    {"figure": "lost", "peer": "ours", "lost": 12.0},
    {"figure": "lost", "peer": "ours, attest=save", "lost": 15.5},
    {"figure": "first save", "told": True, "blocked": 40.0, "held": 1.0},
    {"figure": "first save", "told": False, "blocked": 900.0},
    {"hosts": 10_000, "commit_s": 2.0},
    {"hosts": 50_000, "commit_s": 9.0},
    {"shape": "leaves", "ours": {"durable": [0.04, 0.05]}, "raw limit": {"durable": [0.01, 0.01]}},
    {"shape": "arrays", "ours, tiles": {"other mesh": [0.2], "other mesh reported": [1.0]}},
]


def test_each_goals_figure_is_found_in_what_its_benchmark_prints() -> None:
    printed = "\n".join(["| a table |", "nan", *map(json.dumps, LINES)])
    assert goal_table.measured(goal_table.read(printed)) == {
        **{"lost": 12.0, "attest": 3.5, "first": 40.0},
        **{"10,000 hosts": 2.0, "50,000 hosts": 9.0, "leaves durable": 4.5, "other mesh": 1.0},
    }


def test_a_row_says_whether_its_goal_is_met_or_that_it_was_not_measured() -> None:
    rows = goal_table.table({"lost": 20.0, "50,000 hosts": 9.0}).splitlines()[2:]
    assert len(rows) == len(goal_table.GOALS) == 13
    (lost,), (hosts,) = ([row for row in rows if name in row] for name in ("time lost to one save", "of 50,000 hosts"))
    assert "| 20 ms | yes |" in lost and "| 9 s | **no** |" in hosts
    assert sum("not measured |  |" in row for row in rows) == 11


def test_the_page_has_the_table_of_the_kept_figures() -> None:
    assert goal_table.table(json.loads(goal_table.KEPT.read_text())) in (DOCS / report.SUMMARY).read_text()


@pytest.mark.parametrize(
    ("ratio", "ratios", "said"),
    [
        (1.3, [1.2, 1.3, 1.4, 1.1, 0.9], "**slower**"),
        (0.7, [0.7, 0.6, 0.8, 0.9, 0.7], "faster"),
        (1.3, [1.5, 0.8, 1.6, 0.9, 1.3], ""),  # the turns do not agree
        (1.05, [1.05] * 5, ""),
    ],
)
def test_a_ratio_counts_only_where_the_turns_agree(ratio: float, ratios: list[float], said: str) -> None:
    assert quick.verdict("128 MiB: durable", ratio, ratios) == said
    assert quick.verdict("128 MiB: durable, raw", ratio, ratios) == "the machine"


def test_a_comparison_shows_each_figure_beside_the_baselines_and_the_limit() -> None:
    names = [f"{state}: {column}" for state in quick.STATES for column in ("durable", "restore")]
    before = [{name: 0.2 for name in names} | {f"{name}, raw": 0.1 for name in names} for _ in range(3)]
    now = [turn | {names[0]: 0.4} for turn in before]
    now[0]["new figure"] = 1.0
    text = quick.table(before, now)
    assert "| 128 MiB: durable | 200.0 | 400.0 | 2.00 | 2.00 to 2.00 | **slower** |" in text
    assert "128 MiB, durable: 4.00 x raw; 128 MiB, restore: 2.00 x raw" in text
    assert "| new figure |  | 1000.0 |  |  | not measured in both |" in text

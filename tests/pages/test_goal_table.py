"""The table of goals: figures are found in what benchmarks print, and a goal that was not measured stays a row."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compare, donating, figures, goal_table, gpu_page, quick, report, simulate, whole

DOCS = Path(__file__).parents[2] / "docs"
COMPARED = json.loads((DOCS / "benchmarks.json").read_text())
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


@pytest.mark.slow
def test_every_goal_is_found_in_lines_that_benchmarks_really_print(tmp_path: Path) -> None:
    """Those of an accelerator by their page's dry run, which also proves that it runs; of a comparison, what the last
    one has left; of the others, their own functions."""
    command = [sys.executable, "-m", "benchmarks.gpu_page", "--out", str(tmp_path), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = goal_table.read((tmp_path / gpu_page.FILE).read_text())
    store = simulate.Store(0.05, 0.1, 5000, 1000)
    lines += [{**simulate.simulate(64, 2, store, 2.0, 1), figures.HOSTS: hosts} for hosts in (10_000, 50_000)]
    lines += goal_table.read("\n".join(figures.compared(shape, found) for shape, found in COMPARED.items()))
    found = goal_table.measured(lines)
    # What these two are made of is theirs alone, and checked here without the half a gigabyte that they take.
    apart = {"other mesh": figures.AMPLIFICATIONS, "donating": figures.LINES[donating.FIGURE].fields}
    assert found.keys() | apart.keys() == {goal.name for goal in goal_table.GOALS}
    assert "other mesh reported" in apart["other mesh"] and "grown" in apart["donating"]


@pytest.mark.parametrize(
    "pick",
    [
        lambda: goal_table.figure("lost", "blocked_ms"),
        lambda: goal_table.figure("first save", "blocked", peer="ours"),
        lambda: goal_table.compared("leaves", "other mesh read twice"),
        lambda: goal_table.compared("small", "durable"),
        lambda: goal_table.compared("leaves", "durable", "the raw limit"),
    ],
)
def test_no_goal_can_ask_for_what_nobody_prints(pick: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        pick()


def test_no_benchmark_can_print_what_is_not_defined(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"restore: \['ms'\], expected \['grown', 'ms', 'peer'\]"):
        figures.say("restore", ms=1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("goal", goal_table.GOALS, ids=lambda goal: goal.name)
def test_the_command_beside_a_goal_is_one_that_prints_its_figure(goal: goal_table.Goal) -> None:
    module = goal.command.removeprefix("python -m ").split()[0]
    assert module in {"benchmarks.compare", "benchmarks.simulate", *(line.by for line in figures.LINES.values())}
    assert importlib.util.find_spec(module)
    assert module != "benchmarks.compare" or compare.parse(goal.command.split()[3:]).json


def test_a_row_says_whether_its_goal_is_met_or_that_it_was_not_measured() -> None:
    rows = goal_table.table({"lost": 20.0, "50,000 hosts": 9.0}).splitlines()[2:]
    assert len(rows) == len(goal_table.GOALS) == 13
    (lost,), (hosts,) = ([row for row in rows if name in row] for name in ("time lost to one save", "of 50,000 hosts"))
    assert "| 20 ms | yes |" in lost and "| 9 s | **no** |" in hosts
    assert sum("not measured |  |" in row for row in rows) == 11


def test_the_page_has_the_table_of_the_kept_figures() -> None:
    assert goal_table.table(json.loads(goal_table.KEPT.read_text())) in (DOCS / report.SUMMARY).read_text()


def test_each_goal_that_is_missed_has_its_reason_on_the_page() -> None:
    _, _, reasons = (DOCS / report.SUMMARY).read_text().partition("### Why some are missed\n")
    kept = json.loads(goal_table.KEPT.read_text())
    missed = [goal for goal in goal_table.GOALS if kept.get(goal.name, 0) > goal.at_most]
    assert missed and all(f"- *{goal.what}*: " in reasons for goal in missed)


@pytest.mark.parametrize(
    ("ratio", "ratios", "said"),
    [
        (1.3, [1.2, 1.3, 1.4, 1.1, 0.9], "**slower**"),
        (0.7, [0.7, 0.6, 0.8, 0.9, 0.7], "faster"),
        (1.3, [1.5, 0.8, 1.6, 0.9, 1.3], ""),  # the turns do not agree
        (1.05, [1.05] * 5, ""),
        (1.5, [1.4, 1.6], "too few turns to say"),
        (1.05, [1.0, 1.1], ""),
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
    assert "| 128 MiB: durable | 200.0 | 400.0 | 2.00 | 2.00 to 2.00 | too few turns to say |" in text
    assert "128 MiB, durable: 4.00 x raw; 128 MiB, restore: 2.00 x raw" in text
    assert "| new figure |  | 1000.0 |  |  | not measured in both |" in text


def test_a_whole_benchmark_fits_into_its_time_by_taking_rounds_from_what_takes_longest() -> None:
    cheap, dear = whole.Part("cheap", 10, 1, 7, 7), whole.Part("dear", 10, 100, 7, 1)
    assert whole.fitted([cheap, dear], 2400) == [cheap, dear]
    assert [part.rounds for part in whole.fitted([cheap, dear], 400)] == [7, 3]
    assert whole.fitted([cheap, dear], 100) == [cheap]  # not with fewer rounds than are worth having
    assert whole.fitted([cheap, dear], 10) == []


def test_the_plan_of_the_kept_figures_has_every_part_and_seven_rounds_of_those_with_goals() -> None:
    planned = whole.fitted(whole.parts(COMPARED), whole.BUDGET_MIN * 60)
    assert [part.name for part in planned] == ["arrays", "leaves", "replicated", "gpt2", "growth", "large"]
    assert [part.rounds for part in planned[:2]] == [7, 7]
    assert sum(part.seconds for part in planned) <= whole.BUDGET_MIN * 60
    assert "| all | | " in whole.shown(planned, whole.BUDGET_MIN * 60)

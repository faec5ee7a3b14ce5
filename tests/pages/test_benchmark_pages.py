"""The pages of figures, and what writes them: tables come from benchmarks.json, and no run can miss its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import accelerator, report

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = json.loads((DOCS / "benchmarks.json").read_text())


def test_the_medians_on_the_page_are_those_of_the_raw_figures() -> None:
    assert report.summary(FIGURES) in (DOCS / report.SUMMARY).read_text()
    assert (DOCS / "benchmarks.svg").read_text() == report.plot(FIGURES)


def test_what_runs_write_lands_between_their_marks(tmp_path: Path) -> None:
    for page in (report.SUMMARY, report.TABLES):
        (tmp_path / page).write_text((DOCS / page).read_text())
    report.write(str(tmp_path), FIGURES)
    report.put(str(tmp_path), accelerator.COMMAND, "of an accelerator\n")
    report.put(str(tmp_path), accelerator.COMMAND, "in short\n", report.SUMMARY)
    tables, summary = (tmp_path / report.TABLES).read_text(), (tmp_path / report.SUMMARY).read_text()
    assert tables.count("rounds\n\n| median ms (min to max)") == len(FIGURES) and "of an accelerator" in tables
    assert report.summary(FIGURES) in summary and "in short" in summary
    with pytest.raises(SystemExit, match="no place for the tables"):
        report.put(str(tmp_path), "another command", "")

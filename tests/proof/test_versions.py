"""What `make test-versions` makes of its parts' reports."""

from __future__ import annotations

import pytest

from launch.example.report import Summary
from tests.proof import versions
from tests.proof.versions import BEGIN, END, ROWS, Result

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="skipped"><skipped/></testcase>
<testcase classname="tests.a" name="bad"><failure/></testcase><testcase classname="" name="tests.b"><error/></testcase>
</testsuite></testsuites>"""
ASKS = b'[project]\ndependencies = ["jax>=%s"]\nversion = "%s"'
FILES = {"pyproject.toml": ASKS % (b"1", b"1"), "requirements-3.11.lock": b"b", "requirements-3.12.lock": b"c"}


def test_tests_that_failed_or_could_not_be_collected_are_named() -> None:
    assert versions.counts(JUNIT) == (1, ["tests.a.bad", "tests.b"])


def test_an_environment_is_built_again_when_what_it_is_made_from_has_changed() -> None:
    for file, text, rebuilt in (
        ("pyproject.toml", ASKS % (b"2", b"1"), set(ROWS)),
        ("pyproject.toml", ASKS % (b"1", b"2"), set()),
        ("requirements-3.11.lock", b"other", {"lock"}),
        ("requirements-3.12.lock", b"other", {"newest"}),
    ):
        changed = {**FILES, file: text}
        assert {name for name, row in ROWS.items() if versions.key_of(row, changed) != versions.key_of(row, FILES)} == (
            rebuilt
        )
    assert len({versions.key_of(row, FILES) for row in ROWS.values()}) == len(ROWS)


LINES = ["[host-0] step 2     saving  digest abc", "[host-0] step 4     saving  digest def"]


@pytest.mark.parametrize(
    ("code", "lines", "summary", "says"),
    [
        (0, LINES, Summary(2, 2, {}, restored_step=2, restored_digest="abc", latest_step=5), ""),
        (0, LINES, Summary(2, 2, {}, restored_step=2, restored_digest="xyz", latest_step=5), "restored xyz"),
        (0, LINES[1:], Summary(2, 2, {}, restored_step=2, restored_digest="abc", latest_step=5), "restored abc"),
        (0, LINES, Summary(2, 2, {}, latest_step=5), "restored step None"),
        (0, LINES, Summary(2, 2, {}, restored_step=2, restored_digest="abc", latest_step=2), "ended with 2"),
        (124, LINES, None, "exit code 124"),
        (0, LINES, None, "exit code 0"),
    ],
)
def test_a_job_is_good_if_it_went_on_from_what_it_had_saved(
    code: int, lines: list[str], summary: Summary | None, says: str
) -> None:
    problem = versions.job_problem(code, lines, summary)
    assert problem.startswith(says) if not says else says in problem
    assert bool(problem) == bool(says)


def test_the_table_says_what_was_not_run_and_what_went_wrong() -> None:
    went_wrong = Result("", job="exit code 4", restored={"oldest": "", "lock": "w: other"}, passed=3, failed=["t"])
    went_wrong.sources = dict.fromkeys(versions.PARTS, "now")
    missing = Result("", missing="no Python 3.13 on this machine")
    text = versions.table({"oldest": went_wrong, "newest": missing}, "now")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| **no** | 1 of 2 | 3 passed, **1 failed** |" in rows["oldest"]
    assert "| not run | not run | not run |" in rows["lock"]
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert notes == [
        "- oldest: exit code 4",
        "- oldest: `t` failed",
        "- oldest: the checkpoint of lock: w: other",
        "- newest: no Python 3.13 on this machine",
    ]


def test_what_was_run_of_another_source_is_not_told_as_if_it_were_of_this_one() -> None:
    result = Result("", job="", restored={"lock": ""}, passed=3, sources={"job": "now", "checkpoints": "then"})
    (line,) = [line for line in versions.table({"lock": result}, "now").splitlines() if line.startswith("| lock ")]
    assert line.endswith("| yes | 1 of 1 (of an older source) | 3 passed (of an older source) |")


def test_the_page_is_as_before_but_for_what_is_between_the_marks() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert versions.with_table(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"

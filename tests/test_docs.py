"""The pages that people copy from: every example runs, every link leads somewhere, every public name is explained."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

import pytest

import orchestrator as oc
from launch.__main__ import FLAGS
from orchestrator import failpoints
from orchestrator.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def examples(text: str) -> list[tuple[int, str]]:
    """(lines before it, source) of each fenced python block."""
    return [
        (text.count("\n", 0, found.start(3)), textwrap.dedent(found[3]))
        for found in FENCE.finditer(text)
        if found[2] == "python"
    ]


def anchors(text: str) -> set[str]:
    """Headings as a page's links name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page.read_text())], ids=name)
def test_every_python_example_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in examples(page.read_text()):  # blank lines, so that a traceback names the page's own line
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


def test_there_are_examples_to_run() -> None:
    assert sum(len(examples(page.read_text())) for page in PAGES) > 10


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{name(page)}: {link}: no such heading"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/reference/api.md", [*oc.__all__, *(field.name for field in dataclasses.fields(oc.Options))]),
        ("docs/operating.md", [*COMMANDS, *(f"--{flag}" for flag in FLAGS)]),
        ("docs/failure-modes.md", [*failpoints.PLACES, *failpoints.ACTIONS, *failpoints.CONDITIONS]),
    ],
)
def test_a_reference_leaves_out_no_name(page: str, words: list[str]) -> None:
    text = (ROOT / page).read_text()
    missing = [word for word in words if not re.search(rf"`[^`\n]*(?<![\w-]){re.escape(word)}(?![\w-])[^`\n]*`", text)]
    assert missing == [], page


def test_every_environment_variable_that_is_read_is_explained() -> None:
    sources = [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    used = {found for source in sources for found in re.findall(r"\bORCHESTRATOR_[A-Z_]+\b", source.read_text())}
    text = (ROOT / "docs/operating.md").read_text()
    assert {variable for variable in used if f"`{variable}`" not in text} == set()

"""The words that people read, in pages and in what programs say: one idea, one word (CONTRIBUTING.md has the table).

Read are the pages, all strings of the programs that are sentences, the report's page, and what goes to Prometheus and
Grafana. Not read are decisions and the changelog, which tell what was, and tables of what runs had printed then.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if "decisions" not in page.parts and page.name not in ("forged-runs.md", "benchmark-tables.md")
    ),
]
SHIPPED = [*sorted((ROOT / "orchestrator/cli/page").iterdir()), *sorted((ROOT / "docs/ops").iterdir())]
SOURCES = [path for folder in ("orchestrator", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]

# A word that may not come back, what is said instead, and a sentence that had it.
WORDS = {
    r"\bincarnations?\b": ("epoch", "a newer incarnation has taken over"),
    r"\btold by\b": ("recorded by", "told by host-0"),
    r"\bproven:": ("read back, or restored", "4 steps; proven: 50"),
    r"\b(lets?|letting) (it|them) go\b": ("will delete, expires", "retention lets them go"),
    r", wanted\b|\bwanted:": ("expected", "16 bytes, wanted 52"),
    r"\bthere (is|are): ": ("choose from", "no such flag; there is: --wide"),
    r"\banew\b|\bmends?\b|\bmended\b": ("again, fix", "mend it, and start anew"),
    r"\bcomes? back from step\b|\bcame back from step\b": ("resumes from", "the job came back from step 20"),
    r"\bsealed\b|\bseals\b": ("makes durable", "its files are sealed"),
    r"\b\d+(\.\d+)? ?(MB|kB|KB)\b(?!/s)": ("MiB, KiB", "downloads 805 MB"),
}
RECORDED = ("docs/containers.md", "docs/integrity.md", "docs/versions.md")  # in the units of what measured it


def sentences(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each string that people may read: no docstrings, and no single words."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    contracts = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and _has_one(node)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from () if id(node) in contracts else ((node.lineno, node.value),)


def _has_one(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


@functools.cache
def read() -> tuple[tuple[str, str], ...]:
    """(where, text) of all that is read."""
    return tuple(_read())


def _read() -> Iterator[tuple[str, str]]:
    for path in (*PAGES, *SHIPPED):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line
    for path in SOURCES:
        for number, text in sentences(path.read_text()):
            yield f"{path.relative_to(ROOT)}:{number}", text


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_was_replaced_does_not_come_back(word: str) -> None:
    instead, sentence = WORDS[word]
    assert re.search(word, sentence, re.IGNORECASE), "it would be seen"
    skipped = RECORDED if "MB" in word else ()
    found = [f"{where}: {text.strip()[:100]}" for where, text in read() if re.search(word, text, re.IGNORECASE)]
    assert [each for each in found if not each.startswith(skipped)] == [], f"say: {instead}"


def test_sentences_of_programs_are_read_and_contracts_are_not() -> None:
    source = 'def f():\n    """Its incarnation."""\n    raise E(f"{n} of this incarnation", "word")\n'
    assert [text for _, text in sentences(source)] == [" of this incarnation"]
    assert len(read()) > 5000

"""ARCHITECTURE.md, held against the sources: every path exists, every name is defined where the page says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*(/|\.\w+)")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
PLACED = re.compile(r"`([A-Za-z_][\w.]*)(?:\([^)`]*\))?`,? (?:in |\()`([\w/]+\.py)`")
OTHERS = {"jax.experimental.multihost_utils", "orchestrator"}  # neither a path nor a name of ours


@cache
def defined() -> frozenset[str]:
    """Every name of both packages."""
    paths = [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    return frozenset().union(*map(defined_in, paths))


@cache
def defined_in(path: Path) -> frozenset[str]:
    """Classes, functions and fields, as `name` and `owner.name`; the owner is a class, the module or the folder."""
    module = path.parent.name if path.stem == "__init__" else path.stem
    return frozenset(
        spelled for owner, name in _names(ast.parse(path.read_text()), module) for spelled in (name, f"{owner}.{name}")
    )


def _names(tree: ast.Module | ast.ClassDef, owner: str) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.ClassDef():
                yield owner, node.name
                yield from _names(node, node.name)
            case ast.FunctionDef():
                yield owner, node.name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield owner, name


@cache
def threads() -> frozenset[str]:
    """Names that the package gives its threads, as the page spells them: `save-STEP`."""
    found = set()
    for path in (ROOT / "orchestrator").rglob("*.py"):
        for name in re.findall(r"(?:\bname|thread_name_prefix)=f?\"([\w{}.-]+)\"", path.read_text()):
            found.add(re.sub(r"\{.*\}", "STEP", name))
    return frozenset(found)


def unknown(page: str) -> list[str]:
    """Spans of `page` that name nothing."""
    return [span for span in dict.fromkeys(SPAN.findall(page)) if not _known(span)]


def _known(span: str) -> bool:
    called = re.sub(r"\(.*\)$", "", span)
    if PATH.fullmatch(span) and "/" in span:
        return (ROOT / span).is_dir() if span.endswith("/") else (ROOT / span).is_file()
    return span in OTHERS or span in threads() or bool(NAME.fullmatch(called) and called in defined())


def misplaced(page: str) -> list[str]:
    """`name` in `file`, or `name` (`file`), where the file does not define it."""
    placed = PLACED.findall(" ".join(page.split()))
    return [f"{name} in {path}" for name, path in placed if name not in defined_in(ROOT / path)]


def test_every_path_and_name_on_the_page_exists() -> None:
    assert unknown(PAGE) == []
    assert len(PLACED.findall(" ".join(PAGE.split()))) >= 8 and misplaced(PAGE) == []


@pytest.mark.parametrize(
    "wrong",
    ["orchestrator/nowhere/", "orchestrator/agent.txt", "Agent.safe", "journal.comit", "Agnet", "sav-STEP", "x y"],
)
def test_what_does_not_exist_is_found(wrong: str) -> None:
    assert unknown(f"`{wrong}` and `Agent.save`") == [wrong]


def test_a_name_that_another_file_defines_is_found() -> None:
    page = "`Agent.save` in `orchestrator/reader.py`, `Agent.save(step)` (`orchestrator/agent.py`)"
    assert misplaced(page) == ["Agent.save in orchestrator/reader.py"]


def test_the_page_stays_short_enough_to_be_read() -> None:
    assert len(PAGE.splitlines()) <= 130

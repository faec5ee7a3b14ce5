"""ARCHITECTURE.md, held against the sources: every path exists, every name is defined where the page says, and every
thread that the package starts has a row."""

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
THREADS = {"Thread": "name", "Timer": "name", "ThreadPoolExecutor": "thread_name_prefix"}  # and where its name is
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
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield owner, name


@cache
def threads() -> frozenset[str]:
    """Names that the package gives its threads, as the page spells them: `save-STEP`."""
    return frozenset().union(*(threads_in(path.read_text()) for path in (ROOT / "orchestrator").rglob("*.py")))


def threads_in(source: str) -> frozenset[str]:
    """Of the threads and pools that are made there; '' for one without a name."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [(call, THREADS.get(ast.unparse(call.func).rpartition(".")[2])) for call in calls]
    return frozenset(_thread_name(call, keyword) for call, keyword in made if keyword)


def _thread_name(call: ast.Call, keyword: str) -> str:
    named = [ast.unparse(given.value) for given in call.keywords if given.arg == keyword]
    return re.sub(r"\{.*\}", "STEP", named[0]).removeprefix("f").strip("'\"") if named else ""


def rows(page: str) -> frozenset[str]:
    """Threads in the first column of the page's table of threads."""
    _, _, table = page.partition("\n| thread |")
    cells = [line.split("|")[1] for line in table.partition("\n\n")[0].splitlines()[1:]]
    return frozenset(name for cell in cells for name in SPAN.findall(cell))


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


def test_every_thread_has_a_row_and_every_row_a_thread() -> None:
    assert rows(PAGE) == threads()


def test_a_thread_is_found_however_it_is_made() -> None:
    made = 'Thread(target=f, name="a"); threading.Thread(name=f"b-{x}"); ThreadPoolExecutor(4, thread_name_prefix="c")'
    assert threads_in(made) == {"a", "b-STEP", "c"}
    assert threads_in("threading.Thread(target=f, daemon=True)") == {""}
    assert rows("\n| thread | by |\n|---|---|\n| `a`, `b-STEP` | `x` |\n\n| `y` |\n") == {"a", "b-STEP"}


def test_the_page_stays_short_enough_to_be_read() -> None:
    assert len(PAGE.splitlines()) <= 135

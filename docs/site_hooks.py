"""Pages of the site that are made from something else: the home page from README.md, the references from the code."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orchestrator
from launch import __main__ as launch
from orchestrator.cli import main as cli

ROOT = Path(__file__).parent.parent


def top(name: str) -> str:
    """A page of the top folder, with its links as seen from docs/."""
    return re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", (ROOT / name).read_text())


def api() -> str:
    """Every public name, by its docstring and signature, the agent first."""
    names = sorted(orchestrator.__all__, key=lambda name: (name != "Agent", name.lower()))
    entries = [f"::: {orchestrator._HOME_OF.get(name, 'orchestrator')}.{name}" for name in names]
    intro = "Made from the docstrings: every name of `import orchestrator as oc`. [By subject](api.md)."
    return "\n\n".join(["# Every public name", intro, *entries]) + "\n"


def command_line() -> str:
    """What every command says for --help."""
    parts = ["# Every --help", "What `--help` says. [With outputs](cli.md)."]
    for program, main, commands in (
        ("orchestrator", cli.main, cli.COMMANDS),
        ("orchestrator launch", launch.main, launch.COMMANDS),
    ):
        parts += [f"```text\n{_said(main, ['--help'])}```"]
        for name in commands:
            parts += [f"## {program} {name}", f"```text\n{_said(main, [name, '--help'])}```"]
    return "\n\n".join(parts) + "\n"


def _said(main: Callable[[Sequence[str]], int], arguments: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["", *arguments])
    return out.getvalue().rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "index.md": lambda: top("README.md"),
    "LICENSE": lambda: top("LICENSE"),
    **{name: partial(top, name) for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")},
    "reference/generated-api.md": api,
    "reference/generated-cli.md": command_line,
}


def _listed(nav: Any) -> Iterator[str]:
    match nav:
        case str():
            yield nav
        case dict():
            for each in nav.values():
                yield from _listed(each)
        case list():
            for each in nav:
                yield from _listed(each)


def _index_first(page: str) -> tuple[bool, str]:
    return not page.endswith("README.md"), page


def on_config(config: Any) -> Any:
    """mkdocs's hook: pages that mkdocs.yml does not place go to the guides, decisions to a section of their own."""
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    left = sorted(there - set(_listed(config["nav"])))
    sections = {name: entries for section in config["nav"] for name, entries in section.items()}
    sections["Guides"] += [page for page in left if "/" not in page]
    sections["Reference"] += [page for page in left if page.startswith("reference/")]
    config["nav"] += [
        {"The code": ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]},
        {"Decisions": sorted((page for page in left if page.startswith("decisions/")), key=_index_first)},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """mkdocs's hook: adds the pages that are made."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=make()))
    return files

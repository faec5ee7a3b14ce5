"""The pages that people copy from: every example runs, every link leads somewhere, every public name is explained."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from launch.__main__ import FLAGS
from launch.engines import gke, slurm, tpu_vm
from orchestrator import failpoints
from orchestrator.cli.main import COMMANDS
from tests.pages import pages
from tests.pages.pages import FENCE

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def examples(text: str) -> list[tuple[int, str]]:
    """(lines before it, source) of each fenced python block."""
    return [(block.line, block.source) for block in pages.blocks(text) if block.language == "python"]


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


TRAINS, SMALLER = "launch train --root=job ", "--layers=1 --width=32 --length=16 "


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if pages.commands(page.read_text())], ids=name)
def test_every_shell_example_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """What is trained is smaller, as a page's hundreds of steps are most of what it takes."""
    found = [command.replace(TRAINS, TRAINS + SMALLER) for command in pages.commands(page.read_text())]
    said = "".join(pages.run(command, tmp_path)[1] for command in found)
    if page.stem == "quickstart":  # and does what the page says
        assert "restored step 50" in said and "restored step 79" in said


# Guides for one machine. Clusters, containers and benchmarks have tests of what their pages' commands make.
GUIDES = ["quickstart", "concepts", "ecosystem", "from-orbax", "restoring-elsewhere", "operating"]
# Blocks of commands in them that are not run as they stand, and what runs the same.
NOT_RUN = {
    "quickstart": "make setup, which this suite itself has needed",
    "from-orbax": "adopt from a bucket: tests/compat/test_adopt_store.py",
    "operating": "gc, pin and unpin on a ROOT: tests/cli/test_commands.py",
}
COMMAND = re.compile(r"^(orchestrator|python -m|make|export|pip) ", re.MULTILINE)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_block_of_commands_in_a_guide_is_run_or_says_why_not(guide: str) -> None:
    text = (ROOT / f"docs/{guide}.md").read_text()
    loose = [block.source for block in pages.blocks(text) if block.language not in ("python", "sh", "text")]
    commands = [source for source in loose if COMMAND.search(source)]
    assert bool(commands) == (guide in NOT_RUN), commands


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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_source_file_that_a_page_mentions_exists(page: Path) -> None:
    mentioned = re.findall(
        r"`((?:orchestrator|launch|tests|docs|examples|benchmarks|docker)/[\w/.-]+)`", page.read_text()
    )
    assert [path for path in mentioned if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/reference/api.md", [*oc.__all__, *(field.name for field in dataclasses.fields(oc.Options))]),
        ("docs/launching.md", [f"--{flag}" for flag in FLAGS]),
        ("docs/reference/cli.md", list(COMMANDS)),
        ("docs/failure-modes.md", [*failpoints.PLACES, *failpoints.ACTIONS, *failpoints.CONDITIONS]),
    ],
)
def test_a_reference_leaves_out_no_name(page: str, words: list[str]) -> None:
    text = (ROOT / page).read_text()
    spans = " ".join(re.findall(r"`[^`\n]+`|^## .*$", text, re.MULTILINE))
    missing = [word for word in words if not re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", spans)]
    assert missing == [], page


def test_every_environment_variable_that_is_read_is_explained() -> None:
    sources = [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    used = {found for source in sources for found in re.findall(r"\bORCHESTRATOR_[A-Z_]+\b", source.read_text())}
    text = (ROOT / "docs/operating.md").read_text()
    assert {variable for variable in used if f"`{variable}`" not in text} == set()


def test_decisions_are_numbered_without_gaps_and_say_why() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    index = (ROOT / "docs/decisions/README.md").read_text()
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for number, page in enumerate(pages, 1):
        text = page.read_text()
        assert text.startswith(f"# {number}. ") and f"({page.name})" in index, page.name
        assert all(f"**{part}" in text for part in ("Context", "Decision", "Consequences")), page.name


def test_the_version_is_the_changelogs_newest_and_the_readmes() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## (\d\S*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
    assert f"Version {version}." in (ROOT / "README.md").read_text()


def site_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_references_made_from_the_code_leave_nothing_out() -> None:
    made = {path: make() for path, make in site_hooks().PAGES.items()}
    for public in oc.__all__:
        assert re.search(rf"^::: orchestrator\S*\.{public}$", made["reference/generated-api.md"], re.MULTILINE), public
    for command, about in COMMANDS.items():
        assert f"## orchestrator {command}\n" in made["reference/generated-cli.md"]
        assert all(f"--{flag.name}" in made["reference/generated-cli.md"] for flag in about.flags)
    for engine, flags in (("local", FLAGS), ("slurm", slurm.FLAGS), ("gke", gke.FLAGS), ("tpu-vm", tpu_vm.FLAGS)):
        _, _, rest = made["reference/generated-cli.md"].partition(f"## orchestrator launch {engine}\n")
        section = rest.partition("\n## ")[0]
        assert [flag for flag in flags if f"  --{flag} " not in section] == []
    for option in dataclasses.fields(oc.Options):
        assert re.search(rf"\b{option.name}\b", oc.Options.__doc__ or ""), option.name
    assert "](quickstart.md)" in made["index.md"] and "](docs/" not in made["index.md"]

"""The site that `make docs` builds: where mkdocs is installed, it is built and looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILT = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))
needs_mkdocs = pytest.mark.skipif(not BUILT, reason="mkdocs-material is not installed: `make docs` installs it")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={place}"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def entries(page: str) -> list[str]:
    """The navigation's names, in order: sections and pages, but not the open page's own headings."""
    menu = page[page.index("md-sidebar--primary") : page.index("md-sidebar--secondary")]
    menu = re.sub(r'<nav class="md-nav md-nav--secondary".*?</nav>', "", menu, flags=re.DOTALL)
    # The open page is there twice, as a link and as the button that shows its headings on a phone.
    menu = re.sub(r'<label class="md-nav__link md-nav__link--active".*?</label>', "", menu, flags=re.DOTALL)
    names = re.findall(r'<(?:a|label)[^>]*class="md-nav__link[^>]*>(.*?)</(?:a|label)>', menu, re.DOTALL)
    return [name for each in names if (name := unescape(re.sub(r"<[^>]+>", " ", each)).strip())]


@needs_mkdocs
@pytest.mark.slow
def test_no_entry_of_the_navigation_is_there_twice(site: Path) -> None:
    for page in ("index.html", "concepts.html", "decisions/index.html", "reference/cli.html"):
        named = entries((site / page).read_text())
        assert {"Quickstart", "Concepts", "Decisions", "Metrics"} <= set(named)
        assert [name for name, count in Counter(named).items() if count > 1] == [], page


@needs_mkdocs
@pytest.mark.slow
def test_the_site_is_searched_from_a_disk_and_loads_nothing_from_other_hosts(site: Path) -> None:
    index = (site / "search" / "search_index.js").read_text()  # a script: a page on a disk may read no JSON file
    found = {entry["location"].partition("#")[0] for entry in json.loads(index.removeprefix("var __index = "))["docs"]}
    assert {"quickstart.html", "reference/generated-cli.html"} <= found
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', text) == [], page
        assert "assets/iframe-worker.js" in text, page
    api = (site / "reference" / "generated-api.html").read_text()
    assert "the newest good step, or" in api.lower() and "max_loss_s" in api, "the docstrings are there"


@needs_mkdocs
@pytest.mark.slow
def test_the_reader_switches_between_light_and_dark(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert {"default", "slate"} <= set(re.findall(r'data-md-color-scheme="(\w+)"', page))
    assert page.count('for="__palette_') == 3
    for drawing in (*(ROOT / "docs").glob("*.svg"), *(ROOT / "docs" / "images").glob("protocol.svg")):
        assert "prefers-color-scheme:dark" in drawing.read_text(), f"{drawing} does not suit the dark"

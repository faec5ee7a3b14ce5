"""Results that a test writes into a page of the documentation, so that nobody writes them by hand."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, command: str, text: str) -> None:
    """Replace what is between the page's marks of this `command`."""
    begin, end = f"<!-- begin: written by {command} -->", "<!-- end -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    assert found and closed, f"{page}: no marks of {command}"
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")

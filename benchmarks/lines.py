"""A file of JSON lines that grows from one measurement to the next, and from run to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """All whole lines; none where there is no file yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def keep(lines: Iterable[Line], path: Path | None, show: Callable[[Line], str] = json.dumps) -> list[Line]:
    """Print each line and append it to `path` as it comes. Returns all that are there then, or without a path these."""
    found = []
    for line in lines:
        print(show(line), flush=True)
        found.append(line)
        if path:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return read(path) if path else found

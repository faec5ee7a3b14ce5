"""The environment variables of the project: each name once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from orchestrator import environment

REPOSITORY = Path(__file__).parents[1]


def test_each_variables_name_is_written_once() -> None:
    found: Counter[str] = Counter()
    for package in ("orchestrator", "launch"):
        for path in (REPOSITORY / package).rglob("*.py"):
            found.update(re.findall(r'"(ORCHESTRATOR_[A-Z_]+)"', path.read_text()))
    assert found[environment.HOST_NAME] == 1
    assert [name for name, count in found.items() if count > 1] == []

"""An agent whose saves are done when `save` returns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import orchestrator as oc


@pytest.fixture
def agent(root: Path) -> Iterator[oc.Agent]:
    with oc.Agent(root, options=oc.Options(async_save=False, on_save_failure="raise", other_tree=True)) as made:
        yield made

"""Chunks that are read only to see whether they are what was saved."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from orchestrator import arrays
from orchestrator.rules import chunk_index, keys
from tests.support.runs import fill, store_of

DESCRIPTORS = Path("/proc/self/fd")


@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="Linux")
def test_checking_a_step_leaves_no_file_open(root: Path) -> None:
    fill(root, 1)
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    directory = f"{store.url}/{live.id.prefix}{keys.STATE}"
    stored = chunk_index.stored(store.step(live).manifest)
    for _ in range(2):  # what the first one keeps is of the library
        assert arrays.check(directory, stored) == {}
        deadline = time.monotonic() + 30
        while open_below(root) and time.monotonic() < deadline:  # TensorStore closes its own a moment later
            time.sleep(0.01)
        assert open_below(root) == []


def open_below(root: Path) -> list[str]:
    found = []
    for path in DESCRIPTORS.iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found.append(os.readlink(path))
    return [link for link in found if link.startswith(str(root)) and os.path.isfile(link)]

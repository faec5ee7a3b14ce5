"""A real job of two hosts is cut off in the middle of holding, copying and saving; the other host is lost with it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.proof.tier_crash import broken, explore, points, trace

pytestmark = pytest.mark.jobs


@pytest.mark.timeout(300)
def test_whatever_is_left_of_one_host_nothing_that_comes_back_is_a_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the images; `python -m tests.proof.tier_crash` tries all, of two starts."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    monkeypatch.setenv("STARTS", "1")
    traced = trace(tmp_path)
    counts, wrong = explore(traced, most=20)
    print(f"{len(traced[1])} effects, {counts}")
    assert wrong == []
    assert counts["a crash"][0] > 300 and counts["a power cut"][0] > 20
    last = list(points(traced, power_cut=False))[-1]
    assert last.held == 4 and last.saved == 3
    (told,) = broken(replace(last, held=5), 1, tmp_path / "beyond", power_cut=False)
    assert told == "came back on 4; held 5, saved 3 had been said"

"""An untested newer release of a library is a warning, once, and never a refusal or a downgrade."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from orchestrator import versions

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("have", "is_newer"),
    [("0.8.3", False), ("0.12.0.1", False), ("0.12.9", False), ("0.13.0", True), ("0.13.0rc1", True), ("1.0", True)],
)
def test_a_jax_of_a_later_series_than_the_tested_ones_is_named(have: str, is_newer: bool) -> None:
    def installed(name: str) -> str:
        if name != "jax":
            raise metadata.PackageNotFoundError(name)
        return have

    assert [line.split(" is ")[0] for line in versions.newer(installed)] == [f"jax {have}"] * is_newer


def test_it_is_warned_of_once_and_asked_once_however_many_agents_there_are(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def installed(name: str) -> str:
        asked.append(name)
        return "0.99" if name == "jax" else "0.0"

    monkeypatch.setattr(versions, "_asked", False)
    for _ in range(2):
        versions.warn_of_newer(installed)
    assert sum("jax 0.99 is newer" in record.getMessage() for record in caplog.records) == 1
    assert asked == list(versions.TESTED)


def test_what_is_installed_here_has_been_tested() -> None:
    assert list(versions.newer()) == []


def test_no_dependency_has_an_upper_bound_by_which_pip_would_downgrade_it() -> None:
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        assert {each.operator for each in Requirement(text).specifier} == {">="}, text

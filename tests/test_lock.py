"""The locks of Python 3.11 and of later ones: what `make setup` installs, with hashes, within pyproject's bounds."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements-3.11.lock", "requirements-3.12.lock")
EXTRAS = ("train", "grain", "dev", "gke", "traces", "safetensors")


def pins(lock: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> (version, hashes)."""
    text = re.sub(r"^#.*\n", "", (ROOT / lock).read_text(), flags=re.MULTILINE)
    found = {}
    for entry in text.replace("\\\n", " ").splitlines():
        pin, *hashes = entry.split()
        name, equals, version = pin.partition("==")
        assert equals and name not in found, entry
        found[canonicalize_name(name)] = (version, hashes)
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_the_hashes_of_its_files(lock: str) -> None:
    assert len(pins(lock)) > 90
    for name, (_, hashes) in pins(lock).items():
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name


@pytest.mark.parametrize("lock", LOCKS)
def test_what_the_project_needs_is_pinned_within_its_bounds(lock: str) -> None:
    locked = pins(lock)
    project = PROJECT["project"]
    needed = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    needed += [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, needed):
        if requirement.name != project["name"]:
            version, _ = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


def test_the_lock_is_installed_by_its_hashes_only() -> None:
    for file, command in (("Makefile", "pip install"), ("docker/Dockerfile", "pip download")):
        lines = (ROOT / file).read_text().splitlines()
        (line,) = [line for line in lines if command in line and re.search("-r |--requirement=", line)]
        assert "--require-hashes" in line, line


@pytest.mark.parametrize(
    ("environment", "given", "chosen"),
    [
        (None, [], "python3"),
        (f"home = /x\nexecutable = {sys.executable}\n", [], sys.executable),
        ("executable = /no/such/python\n", [], "python3"),  # it was taken away since
        ("home = /x\n", [], "python3"),
        (f"executable = {sys.executable}\n", ["PYTHON=python3.13"], "python3.13"),
    ],
)
def test_make_goes_on_with_the_python_of_the_environment_that_is_there(
    tmp_path: Path, environment: str | None, given: list[str], chosen: str
) -> None:
    if environment is not None:
        (tmp_path / ".venv").mkdir()
        (tmp_path / ".venv" / "pyvenv.cfg").write_text(environment)
    ask = ["make", "-s", "-f", str(ROOT / "Makefile"), "--eval=chosen:;@echo $(PYTHON)", "chosen", *given]
    assert subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip() == chosen

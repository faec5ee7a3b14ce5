"""requirements.lock: all that `make setup` installs, each at one version, with hashes, within pyproject's bounds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = ("train", "grain", "dev", "gke", "traces", "safetensors")


def pins() -> dict[str, tuple[str, list[str]]]:
    """Name -> (version, hashes)."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    found = {}
    for entry in text.replace("\\\n", " ").splitlines():
        pin, *hashes = entry.split()
        name, equals, version = pin.partition("==")
        assert equals and name not in found, entry
        found[canonicalize_name(name)] = (version, hashes)
    return found


def test_every_pin_has_the_hashes_of_its_files() -> None:
    assert len(pins()) > 90
    for name, (_, hashes) in pins().items():
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name


def test_what_the_project_needs_is_pinned_within_its_bounds() -> None:
    locked = pins()
    project = PROJECT["project"]
    needed = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    needed += [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, needed):
        if requirement.name != project["name"]:
            version, _ = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), requirement


def test_the_lock_is_installed_by_its_hashes_only() -> None:
    for file, command in (("Makefile", "pip install"), ("docker/Dockerfile", "pip download")):
        (line,) = [
            line for line in (ROOT / file).read_text().splitlines() if command in line and "requirements.lock" in line
        ]
        assert "--require-hashes" in line, line

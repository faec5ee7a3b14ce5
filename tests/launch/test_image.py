"""The image, really built from docker/Dockerfile and used: on a base made here, without a registry or a daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.engines import manifests
from tests.support.reporting import put

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = ("podman", "buildah", "debootstrap", "tar")
BASE, IMAGE = "localhost/base:bookworm", "localhost/checkpoint-orchestrator:test"
SIZE_LIMIT_BYTES = 1.2e9
# How this machine reaches its package index; the image itself knows nothing of it.
PIP_FILES = ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")


def why_not() -> str | None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}; `make test-image` installs them"
    if os.geteuid() != 0:
        return "building without a daemon needs root here"
    return None if "IMAGE_REPORT" in os.environ else "minutes: `make test-image` runs it"


REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(REASON is not None, reason=f"no image: {REASON}"),
]


class Builder:
    """podman and buildah on a store of their own, as they work without cgroups, overlays and user namespaces."""

    def __init__(self, at: Path) -> None:
        self._store = [f"--root={at}/store", f"--runroot={at}/run", "--storage-driver=vfs"]

    def podman(self, *words: str) -> str:
        return self._run(["podman", *self._store, "--cgroup-manager=cgroupfs", *words])

    def buildah(self, *words: str) -> str:
        return self._run(["buildah", *self._store, *words])

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout.strip()

    def inside(self, container: str, *command: str) -> str:
        # With the hostname of a container that has one in its /etc/hosts, as engines with a network make it.
        return self.buildah("run", "--isolation=chroot", "--hostname=localhost", container, "--", *command)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Builder, float]]:
    """(the builder with the image in its store, seconds that the build took)."""
    at = tmp_path_factory.mktemp("image")
    builder = Builder(at)
    include = "--include=python3,python3-venv,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", include, "bookworm", str(at / "base")], check=True, capture_output=True
    )
    left_out = ["--exclude=./dev", "--exclude=./var/cache/apt", "--exclude=./var/lib/apt/lists"]
    subprocess.run(["tar", "-C", str(at / "base"), *left_out, "-cf", str(at / "base.tar"), "."], check=True)
    builder.podman("import", str(at / "base.tar"), BASE)
    volumes = [f"--volume={file}:{file}:ro" for file in PIP_FILES if Path(file).exists()]
    began = time.monotonic()
    builder.podman(
        *("build", "--isolation=chroot", "--format=docker", *volumes, f"--build-arg=BASE_IMAGE={BASE}"),
        *("-f", "docker/Dockerfile", "-t", IMAGE, "."),
    )
    took_s = time.monotonic() - began
    try:
        yield builder, took_s
    finally:
        builder.podman("rmi", "--all", "--force")
        shutil.rmtree(at, ignore_errors=True)


def test_the_image_is_small_runs_as_nobody_special_and_shows_the_demo(built: tuple[Builder, float]) -> None:
    builder, took_s = built
    (image,) = json.loads(builder.podman("inspect", IMAGE))
    assert image["User"] == "10001"
    assert image["Healthcheck"]["Test"] == ["CMD", *manifests.HEALTH]
    (base,) = json.loads(builder.podman("inspect", BASE))
    assert image["Size"] < SIZE_LIMIT_BYTES
    container = builder.buildah("from", IMAGE)
    assert builder.inside(container, "id", "-u") == "10001"
    assert builder.inside(container, *manifests.HEALTH) == "health: no heartbeat yet"
    assert "usage: orchestrator" in builder.inside(container, "orchestrator", "--help")
    no_tools = "import importlib.util as u; print([n for n in ('pip', 'pytest', 'mypy') if u.find_spec(n)])"
    assert builder.inside(container, "python", "-c", no_tools) == "[]"
    began = time.monotonic()
    shown = builder.inside(container, "python", "-m", "launch.demo")
    demo_s = time.monotonic() - began
    proofs = [line.removeprefix("ok  ") for line in shown.splitlines() if line.startswith("ok ")]
    assert len(proofs) == 5, shown
    report = [
        f"- size: {image['Size'] / 1e6:.0f} MB, of which the base is {base['Size'] / 1e6:.0f} MB",
        f"- built in {took_s:.0f} s on two shared cores, with podman's slowest storage driver and no cache",
        f"- `python -m launch.demo`, which is `make demo`, inside it: {demo_s:.0f} s",
        *(f"    - {proof.split('(')[0].strip()}" for proof in proofs[:-1]),
    ]
    put(Path(os.environ["IMAGE_REPORT"]), "make test-image", "\n".join(report))

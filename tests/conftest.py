"""JAX as eight CPU devices, and behind them the machine's own; the few helpers that many tests share."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings

# JAX fails where a platform that is named has no devices, so one is named that has its plugin and a device file. CPUs
# come first: what names no devices runs on them.
PLATFORMS = {
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")),
    "tpu": (("libtpu",), ("/dev/accel0", "/dev/vfio/0")),
}
OTHERS = [
    platform
    for platform, (modules, files) in PLATFORMS.items()
    if any(map(find_spec, modules)) and any(map(os.path.exists, files))
]
jax.config.update("jax_platforms", ",".join(["cpu", *OTHERS]))
jax.config.update("jax_num_cpu_devices", 8)
# How tests and the jobs that they start compile: quickly rather than well (a half of a job's time on two cores), and in
# jobs once for the whole session, as far as JAX does: process 0 keeps what it compiles.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # removed when the session ends
COMPILING = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false" if OTHERS else "true",
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",  # the default keeps what takes more than a second
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
os.environ |= COMPILING
jax.config.update("jax_disable_most_optimizations", not OTHERS)  # JAX here has read its environment
# A shared machine is no place for time limits on single examples; --hypothesis-profile=default has more examples.
settings.register_profile("quick", deadline=None, max_examples=60)
settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Jobs first: their files take longest, and the many short ones then fill the gaps at the end."""
    items.sort(key=lambda item: item.get_closest_marker("jobs") is None)


def accelerators() -> list[Any]:
    """This machine's own."""
    return jax.devices(OTHERS[0]) if OTHERS else []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where a run may be made; it does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(scope="session")
def mesh8() -> Iterator[jax.sharding.Mesh]:
    """Eight devices as data=4 x model=2."""
    yield jax.make_mesh((4, 2), ("data", "model"))


def snapshot(root: Path) -> dict[str, str]:
    """Every file and directory below `root` with a digest of its content: equal snapshots mean nothing changed.
    Events are no part of a run's state: they are left out."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if "events" not in path.relative_to(root).parts):
        name = str(path.relative_to(root))
        found[name] = "directory" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found

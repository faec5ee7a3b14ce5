"""The platforms that the tests run on, and how they and the jobs that they start compile."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Any

# JAX fails where a platform that is named has no devices, so one is named that has its plugin and a device file.
PLATFORMS = {
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")),
    "tpu": (("libtpu",), ("/dev/accel0", "/dev/vfio/0")),
}
OTHERS = [
    platform
    for platform, (modules, files) in PLATFORMS.items()
    if any(map(find_spec, modules)) and any(map(os.path.exists, files))
]
# Quickly rather than well (a half of a job's time on two cores), and in jobs once for the whole session, as far as JAX
# does: process 0 keeps what it compiles.
_compiled = tempfile.TemporaryDirectory(prefix="compiled-")  # removed when the session ends
COMPILING = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "false" if OTHERS else "true",
    "JAX_COMPILATION_CACHE_DIR": _compiled.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",  # the default keeps what takes more than a second
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def accelerators() -> list[Any]:
    """This machine's own devices beside its CPUs."""
    import jax

    return jax.devices(OTHERS[0]) if OTHERS else []

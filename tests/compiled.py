"""What jobs compile, kept for the session's other jobs: compiling the example's model costs more than training it."""

from __future__ import annotations

import tempfile

_directory = tempfile.TemporaryDirectory(prefix="compiled-")  # removed when the session ends
# Everything that takes more than a moment; the default leaves out what compiles in less than a second.
ENVIRON = {
    "JAX_COMPILATION_CACHE_DIR": _directory.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

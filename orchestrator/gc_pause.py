"""Python's cyclic garbage collector, held back while thousands of objects are made that all stay alive.

In a process that has loaded JAX a full collection takes tens of milliseconds, and making the shards of two thousand
leaves sets off several: they took longer than the work itself.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No automatic collection until the block is left, in any thread; then as it was before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # the user's own frozen objects stay frozen
                gc.freeze()  # all that was made counts as old at once: else the next allocation looks at all of it
                gc.unfreeze()
            gc.enable()

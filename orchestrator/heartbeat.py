"""A sign of life for a supervisor outside: a small local file that says what this process last did, and at which step.

Written only where the launcher asks for it (`ORCHESTRATOR_HEARTBEAT_FILE`), from the main thread's own calls, so that a
training loop that hangs stops beating. Best effort: a heartbeat that cannot be written never hurts the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

VARIABLE = "ORCHESTRATOR_HEARTBEAT_FILE"
INTERVAL_S = 0.2

_last: dict[str, object] = {}


def beat(doing: str, step: int | None, **more: object) -> None:
    """Say that the main thread is alive. At most one write per INTERVAL_S for the same activity. Main thread."""
    path = os.environ.get(VARIABLE)
    now = time.monotonic()
    written_s = _last.get("written_s", 0.0)
    assert isinstance(written_s, float)
    if not path or (_last.get("doing") == doing and now - written_s < INTERVAL_S):
        return
    if step is not None:
        _last["step"] = step
    _last.update(more, doing=doing, written_s=now)
    told = {name: value for name, value in _last.items() if name != "written_s"}
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        with open(temporary, "w") as file:
            json.dump({**told, "pid": os.getpid()}, file)
        os.replace(temporary, path)  # a reader sees the old one or the new one, never half

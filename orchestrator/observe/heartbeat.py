"""A sign of life: what this process's main thread last did, and at which step. As an event now and then, for whoever
watches; and in a small local file, for a supervisor outside.

The file is written only where the launcher asks for it (`ORCHESTRATOR_HEARTBEAT_FILE`). Both come from the main
thread's own calls, so that a training loop that hangs records nothing. Best effort: a heartbeat never hurts the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from orchestrator.environment import HEARTBEAT_FILE
from orchestrator.observe.events import Alive, emit

INTERVAL_S = 0.2
EVENT_INTERVAL_S = 5.0

_last: dict[str, object] = {}


def record(doing: str, step: int | None, **more: object) -> None:
    """Say that the main thread is alive. At most one write per INTERVAL_S for the same activity, one event per
    EVENT_INTERVAL_S. Main thread."""
    path = os.environ.get(HEARTBEAT_FILE)
    now = time.monotonic()
    reported_s = _last.get("reported_s", -EVENT_INTERVAL_S)
    assert isinstance(reported_s, float)
    if now - reported_s >= EVENT_INTERVAL_S:
        _last["reported_s"] = now
        emit(Alive(doing, -1 if step is None else step))
    written_s = _last.get("written_s", 0.0)
    assert isinstance(written_s, float)
    if not path or (_last.get("doing") == doing and now - written_s < INTERVAL_S):
        return
    if step is not None:
        _last["step"] = step
    _last.update(more, doing=doing, written_s=now)
    content = {name: value for name, value in _last.items() if name not in ("written_s", "reported_s")}
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w") as file:
            json.dump({**content, "pid": os.getpid()}, file)
        os.replace(temporary, path)  # a reader sees the old one or the new one, never half
    except OSError:  # a full disk has still room for a time stamp; a supervisor kills a process whose file is old
        with contextlib.suppress(OSError):
            os.utime(path)

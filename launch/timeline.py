"""What became of a job and when, as JSON lines beside its logs: where the seconds of a restart go.

`launch.jsonl`, one object a line: `time` (seconds since 1970), `event`, and what belongs to it.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

NAME = "launch.jsonl"


class Timeline:
    """Written to `folder`; None: nowhere. Best effort: a full disk takes the lines, not the job."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / NAME if folder else None

    def record(self, event: str, **fields: object) -> None:
        if self._path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

"""What a supervisor reads of its hosts: the heartbeat files of the agents (`orchestrator.observe.heartbeat`)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from launch import plainfile

_MOST_BYTES = 1 << 16
_DOING_CHARS = 200


class Heartbeats:
    """One directory of heartbeat files, for one incarnation. `steps`, `doing`, `pids`: by each host's newest one."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="heartbeats-"))
        self._seen: dict[int, tuple[int, float]] = {}  # host -> file's time stamp, when we saw it change
        self.steps: dict[int, int] = {}
        self.doing: dict[int, str] = {}
        self.pids: dict[int, int] = {}

    def path(self, index: int) -> Path:
        return self.directory / str(index)

    def poll(self, now_s: float) -> dict[int, float]:
        """Seconds since the newest heartbeat of each host that ever wrote one; {} if the directory is gone.
        `now_s`: a monotonic clock; the hosts' own is not trusted. A file that no agent has written counts for nothing.
        """
        try:
            names = os.listdir(self.directory)
        except OSError:
            return {}
        for name in names:
            if not (name.isascii() and name.isdecimal()):
                continue  # a file about to be moved into place
            index = int(name)
            try:
                stamp = os.stat(self.directory / name).st_mtime_ns
                if self._seen.get(index, (0, 0.0))[0] == stamp:
                    continue
                fields = _fields(plainfile.read_text(self.directory / name, _MOST_BYTES))
            except (OSError, ValueError, RecursionError):
                continue
            self._seen[index] = (stamp, now_s)
            if type(step := fields.get("step")) is int:  # True is an int, too
                self.steps[index] = step
            if type(pid := fields.get("pid")) is int:
                self.pids[index] = pid
            self.doing[index] = f"{fields.get('doing')} at step {fields.get('step')}"[:_DOING_CHARS]
        return {index: now_s - seen_s for index, (_, seen_s) in self._seen.items()}

    def close(self) -> None:
        for _ in range(3):  # whatever is ending may write once more
            shutil.rmtree(self.directory, ignore_errors=True)


def _fields(text: str) -> dict[str, Any]:
    """Raises: ValueError, RecursionError if it is not a JSON object."""
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    return fields

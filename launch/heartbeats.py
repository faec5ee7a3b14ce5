"""What a supervisor hears of its hosts: the heartbeat files that the agents write (`orchestrator.heartbeat`)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path


class Heartbeats:
    """One directory of heartbeat files, for one incarnation. `steps`, `doing`: what each host last said."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="heartbeats-"))
        self._seen: dict[int, tuple[int, float]] = {}  # host -> file's time stamp, when we saw it change
        self.steps: dict[int, int] = {}
        self.doing: dict[int, str] = {}

    def path(self, index: int) -> Path:
        return self._directory / str(index)

    def listen(self, now_s: float) -> dict[int, float]:
        """Seconds of silence of each host that ever beat. `now_s`: a monotonic clock; the hosts' own is not trusted."""
        for path in self._directory.iterdir():
            if not path.name.isdigit():
                continue  # a file about to be moved into place
            index = int(path.name)
            try:
                stamp = path.stat().st_mtime_ns
                if self._seen.get(index, (0, 0.0))[0] == stamp:
                    continue
                said = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            self._seen[index] = (stamp, now_s)
            if isinstance(step := said.get("step"), int):
                self.steps[index] = step
            self.doing[index] = f"{said.get('doing')} at step {said.get('step')}"
        return {index: now_s - heard_s for index, (_, heard_s) in self._seen.items()}

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

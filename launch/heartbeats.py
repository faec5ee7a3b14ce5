"""What a supervisor reads of its hosts: the heartbeat files of the agents (`orchestrator.observe.heartbeat`), of their
main threads and, beside those, of their pulses."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from launch import plainfile
from orchestrator.rules.stalls import Sign

_MOST_BYTES = 1 << 16
_DOING_CHARS = 200
_PULSE = ".pulse"  # as in `orchestrator.observe.heartbeat`


class Heartbeats:
    """One directory of heartbeat files, for one incarnation. `steps`, `doing`, `pids`: by each host's newest one."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="heartbeats-"))
        self._seen: dict[int, tuple[int, float]] = {}  # host -> file's time stamp, when we saw it change
        self.steps: dict[int, int] = {}
        self.doing: dict[int, str] = {}
        self.pids: dict[int, int] = {}
        self._pulses: dict[int, tuple[int, float, dict[str, Any]]] = {}  # as `_seen`, with what it said

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
            main = name.removesuffix(_PULSE)
            if not (main.isascii() and main.isdecimal()):
                continue  # a file about to be moved into place
            index = int(main)
            seen: tuple[Any, ...] | None = (self._seen if main == name else self._pulses).get(index)
            try:
                stamp = os.stat(self.directory / name).st_mtime_ns
                if seen and seen[0] == stamp:
                    continue
                fields = _fields(plainfile.read_text(self.directory / name, _MOST_BYTES))
            except (OSError, ValueError, RecursionError):
                continue
            if main == name:
                self._note(index, fields)
                self._seen[index] = (stamp, now_s)
            else:
                self._pulses[index] = (stamp, now_s, fields)
        return {index: now_s - seen_s for index, (_, seen_s) in self._seen.items()}

    def _note(self, index: int, fields: dict[str, Any]) -> None:
        if type(step := fields.get("step")) is int:  # True is an int, too
            self.steps[index] = step
        if type(pid := fields.get("pid")) is int:
            self.pids[index] = pid
        self.doing[index] = f"{fields.get('doing')} at step {fields.get('step')}"[:_DOING_CHARS]

    def signs(self, now_s: float) -> dict[int, Sign]:
        """`poll`, with what the pulses say: a sign of life of each host that ever recorded a heartbeat."""
        silent_s = self.poll(now_s)
        return {index: self._sign(index, idle_s, now_s) for index, idle_s in silent_s.items()}

    def _sign(self, index: int, idle_s: float, now_s: float) -> Sign:
        step = self.steps.get(index)
        if index not in self._pulses:
            return Sign(idle_s, None, step)
        _, seen_s, said = self._pulses[index]
        return _with_pulse(idle_s, now_s - seen_s, step, said)

    def close(self) -> None:
        for _ in range(3):  # whatever is ending may write once more
            shutil.rmtree(self.directory, ignore_errors=True)


def read_sign(path: str, now: float) -> Sign:
    """The sign of life of the one process that writes the heartbeat file `path`; `now`: seconds since 1970.
    Raises OSError if it cannot be read."""
    idle_s = now - os.stat(path).st_mtime
    try:
        age_s = now - os.stat(path + _PULSE).st_mtime
        said = _fields(plainfile.read_text(Path(path + _PULSE), _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return Sign(idle_s)
    return _with_pulse(idle_s, age_s, None, said)


def _with_pulse(idle_s: float, age_s: float, step: int | None, said: dict[str, Any]) -> Sign:
    """`said`: what the file of the pulse holds, which anybody may have written."""
    steps, barrier = said.get("steps"), said.get("barrier")
    return Sign(
        idle_s,
        age_s,
        step,
        steps if type(steps) is int else None,
        barrier=barrier[:_DOING_CHARS] if isinstance(barrier, str) else "",
    )


def _fields(text: str) -> dict[str, Any]:
    """Raises: ValueError, RecursionError if it is not a JSON object."""
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    return fields

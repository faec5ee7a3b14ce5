"""Signs of life, of two kinds: what the main thread last did, and a pulse from a thread of its own.

In a job that computes together all main threads stop with the first one that does. So what a main thread reports cannot
tell a host that is frozen from those that wait for it. The pulse can: where it stops, the process is frozen or dead;
where it goes on, it says where the main thread is (`Position`) and for how long.

Both go to the event log, for whoever watches; and to small local files, for a supervisor outside, where the launcher
asks for it (`ORCHESTRATOR_HEARTBEAT_FILE`): the main thread's own calls write that file, the pulse writes the one
beside it (`.pulse`). Best effort: neither ever hurts the job.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from orchestrator.environment import HEARTBEAT_FILE
from orchestrator.observe import own_process
from orchestrator.observe.events import Alive, Position, Pulse, emit

INTERVAL_S = 0.2  # between two writings of the main thread's file
PULSE_S = 5.0
ALIVE_S = 60.0  # between two events of a main thread that goes on
STOOD_S = 10.0  # a main thread that reported nothing for so long says so when it goes on
PULSE_SUFFIX = ".pulse"
_TICK_S = 1.0
_STEPS = 33  # whose times say how long a step takes
_CLOSE_S = 2.0


@dataclass(frozen=True)
class _Last:
    """What the main thread reported last; times on the monotonic clock. Replaced as a whole: any thread may read it."""

    doing: str = "starting"
    step: int | None = None
    since: float = field(default_factory=time.monotonic)
    reported: float = field(default_factory=time.monotonic)
    barrier: str = ""
    steps: int = 0
    startup_s: float = 0.0
    fields: Mapping[str, object] = field(default_factory=dict)  # of the file
    written: float = 0.0  # when the file was
    told: float = float("-inf")  # when the event log was


_last = _Last()
_times: deque[tuple[float, int]] = deque(maxlen=_STEPS)  # of steps: when each was first reported


def record(doing: str, step: int | None, **more: object) -> None:
    """Say that the main thread is alive. At most one write per INTERVAL_S for the same activity. One event per ALIVE_S,
    and one when it had stood still for STOOD_S. Main thread."""
    global _last
    last, now = _last, time.monotonic()
    idle_s = now - last.reported
    if now - last.told >= ALIVE_S or (idle_s >= STOOD_S and last.steps >= 2):
        emit(Alive(doing, -1 if step is None else step, idle_s))
        last = replace(last, told=now)
    write = last.doing != doing or now - last.written >= INTERVAL_S
    since = last.since if last.doing == doing else now
    last = replace(last, doing=doing, step=last.step if step is None else step, since=since, reported=now)
    if doing == "opened":  # another agent, perhaps
        _times.clear()
        last = replace(last, steps=0, startup_s=0.0, step=None)
    elif doing == "training" and step is not None and (not _times or _times[-1][1] != step):
        _times.append((now, step))
        startup_s = last.startup_s or (time.time() - _process_started() if last.steps == 1 else 0.0)
        last = replace(last, steps=last.steps + 1, startup_s=max(0.0, startup_s))
    if write:
        fields = {**last.fields, **more, "doing": doing, **({} if step is None else {"step": step})}
        last = replace(last, fields=fields, written=now)
        _write(os.environ.get(HEARTBEAT_FILE), fields)
    _last = last


@contextlib.contextmanager
def waiting(barrier: str) -> Iterator[None]:
    """The main thread waits in a barrier, as long as this is open. Main thread."""
    global _last
    _last = replace(_last, barrier=barrier, reported=time.monotonic())
    try:
        yield
    finally:
        _last = replace(_last, barrier="", reported=time.monotonic())


def position() -> Position:
    """Where this process's main thread is now. Any thread."""
    last, now = _last, time.monotonic()
    return Position(
        last.doing,
        last.step,
        since_s=max(0.0, now - last.since),
        idle_s=max(0.0, now - last.reported),
        barrier=last.barrier,
        steps=last.steps,
        step_s=_step_s(tuple(_times)),
        startup_s=last.startup_s,
    )


def _step_s(times: tuple[tuple[float, int], ...]) -> float:
    pairs = itertools.pairwise(times)
    return statistics.median([(b[0] - a[0]) / (b[1] - a[1]) for a, b in pairs if b[1] > a[1]] or [0.0])


class Heart:
    """The thread of the pulse, from being made until `close`. `late_s` of its events: by how much it woke late, at
    most, since the event before: a process that is starved, or was stopped for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._ended = clock, threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        woke, told, late_s = self._clock(), float("-inf"), 0.0
        while True:
            now = position()
            if (path := os.environ.get(HEARTBEAT_FILE)) is not None:
                _write(
                    path + PULSE_SUFFIX,
                    {"idle_s": now.idle_s, "barrier": now.barrier, "steps": now.steps, "step": now.step},
                )
            if woke - told >= PULSE_S:
                said = {**vars(now), "step": -1 if now.step is None else now.step}
                emit(Pulse(**said, late_s=late_s, process_id=own_process.name_of(os.getpid())))
                told, late_s = woke, 0.0
            if self._ended.wait(_TICK_S):
                return
            before, woke = woke, self._clock()
            late_s = max(late_s, woke - before - _TICK_S)


def _write(path: str | None, fields: Mapping[str, object]) -> None:
    if not path:
        return
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w") as file:
            json.dump({**fields, "pid": os.getpid()}, file)
        os.replace(temporary, path)  # a reader sees the old one or the new one, never half
    except OSError:  # a full disk has still room for a time stamp; a supervisor kills a process whose file is old
        with contextlib.suppress(OSError):
            os.utime(path)


def _process_started() -> float:
    """When this process was started, in seconds since 1970; when this module was loaded, where the kernel hides it."""
    started_s = own_process.started(os.getpid())
    return _loaded if started_s is None else time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)


_loaded = time.time()

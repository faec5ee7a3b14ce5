"""What Orbax's manager tells its `logger` of saves and restores, and `jax.monitoring` of itself. Times: wall clock."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from orchestrator.arrays.format import orbax_api


@dataclass
class SaveStatistics:
    """An entry of the log, with the names that Orbax gives to what is in it."""

    step: int
    event_type: str = "save"
    directory: str = ""
    reached_preemption: bool = False
    preemption_received_at: float | None = None
    synchronous: bool = False
    wait_for_prev_start_time: float | None = None
    wait_for_prev_duration_secs: float | None = None
    time_between_consecutive_saves_sec: float | None = None
    checkpointer_blocking_start_time: float | None = None
    checkpointer_blocking_duration_secs: float | None = None
    get_old_steps_start_time: float | None = None  # retention is decided in the commit
    get_old_steps_duration_secs: float = 0.0
    checkpoint_manager_blocking_start_time: float = field(default_factory=time.time)
    checkpoint_manager_blocking_duration_secs: float | None = None

    def waited_from(self, start: float, last_commit: float | None) -> None:
        """Since `start`, for the save before. last_commit: of a save of this manager."""
        now = time.time()
        self.wait_for_prev_start_time, self.wait_for_prev_duration_secs = start, now - start
        if last_commit is not None:
            self.time_between_consecutive_saves_sec = now - last_commit
        self.checkpointer_blocking_start_time = now

    def blocked_until_now(self) -> None:
        """Training goes on."""
        now = time.time()
        self.checkpointer_blocking_duration_secs = now - (self.checkpointer_blocking_start_time or now)
        self.get_old_steps_start_time = now
        self.checkpoint_manager_blocking_duration_secs = now - self.checkpoint_manager_blocking_start_time


@dataclass
class RestoreStatistics:
    """As SaveStatistics, of a restore. step: None for the newest good one."""

    step: int | None
    event_type: str = "restore"
    directory: str = ""
    checkpointer_start_time: float | None = None
    checkpointer_duration_secs: float | None = None
    checkpoint_manager_start_time: float = field(default_factory=time.time)
    checkpoint_manager_duration_secs: float | None = None

    def restored_since(self, start: float) -> None:
        """`start`: when reading began."""
        now = time.time()
        self.checkpointer_start_time, self.checkpointer_duration_secs = start, now - start
        self.checkpoint_manager_duration_secs = now - self.checkpoint_manager_start_time


class StatisticsLog:
    """Where they go: the user's `logger`, or the log of the program, as in Orbax."""

    def __init__(self, logger: Any, *, continuous: bool) -> None:
        self._logger = logger or orbax_api.public("logging").StandardLogger()
        jax.monitoring.record_event("/jax/orbax/checkpoint_manager/init")
        jax.monitoring.record_scalar("/jax/orbax/checkpoint_manager/continuous_checkpointing_enabled", int(continuous))

    def log(self, statistics: SaveStatistics | RestoreStatistics) -> None:
        entry = asdict(statistics)
        if isinstance(statistics, SaveStatistics):
            _record("/jax/orbax/write/blocking_wait_prev_duration_secs", statistics.wait_for_prev_duration_secs)
            _record("/jax/orbax/write/blocking_duration_secs", statistics.checkpoint_manager_blocking_duration_secs)
        self._logger.log_entry(entry)


def _record(name: str, seconds: float | None) -> None:
    if seconds is not None:
        jax.monitoring.record_event_duration_secs(name, seconds)

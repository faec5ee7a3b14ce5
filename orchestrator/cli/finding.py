"""What a check of `orchestrator doctor` looks at, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from orchestrator.cli.command import Result
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import StoredAttempt
from orchestrator.rules.records import Head
from orchestrator.run import survey
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, local_path
from orchestrator.storage.directory import Root

Level = Literal["ok", "warn", "bad", "damage"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "bad", "damage")
CLOCK_S = 2.0  # more than this between two clocks makes logs misleading
RECOVER = "stop the job; orchestrator recover ROOT lists what is whole, and with --write the run goes on from there"


class Finding(Result, frozen=True):
    """`level`: ok, warn (will hurt some day), bad (hurts the next save or restore, or keeps
    the job from coming to one), damage. `do`: '' if ok."""

    check: str
    level: Level
    text: str
    do: str = ""


@dataclass
class ExaminedRun:
    """The run, read once for all checks."""

    store: JournalStore
    read_only: bool
    events_dir: str | None
    head: Head

    @property
    def local(self) -> Path | None:
        path = local_path(self.store.url)
        return Path(path) if path is not None else None

    @property
    def root(self) -> Root | None:
        """The run's directory, None in an object store."""
        return self.store.storage.root if isinstance(self.store.storage, PosixStorage) else None

    @cached_property
    def stored(self) -> dict[AttemptId, StoredAttempt]:
        return survey.attempts(self.store.storage)

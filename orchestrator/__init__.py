"""Checkpoint orchestrator for multi-process JAX jobs. Start with `Agent`; read-only users with `open_run`."""

from __future__ import annotations

import os

from orchestrator.agent import Agent
from orchestrator.catalog import Catalog
from orchestrator.errors import (
    Damaged,
    Fenced,
    Mismatch,
    NewerFormat,
    NotARun,
    NothingToRestore,
    OrchestratorError,
    OtherJob,
    OutcomeUnknown,
    SaveFailed,
    StepNotFound,
    StorageError,
    UnsafeKey,
    UnsupportedLeaf,
    UsageError,
    WaitTimeout,
)
from orchestrator.options import Options
from orchestrator.policy import at, best, every, every_nth, every_seconds, last, within
from orchestrator.restore import Restored, Run
from orchestrator.storage import open_storage

__all__ = [
    "Agent",
    "Damaged",
    "Fenced",
    "Mismatch",
    "NewerFormat",
    "NotARun",
    "NothingToRestore",
    "Options",
    "OrchestratorError",
    "OtherJob",
    "OutcomeUnknown",
    "Restored",
    "Run",
    "SaveFailed",
    "StepNotFound",
    "StorageError",
    "UnsafeKey",
    "UnsupportedLeaf",
    "UsageError",
    "WaitTimeout",
    "at",
    "best",
    "every",
    "every_nth",
    "every_seconds",
    "last",
    "open_run",
    "within",
]


def open_run(root: str | os.PathLike[str]) -> Run:
    """Open a run for reading. Writes nothing. Raises NotARun, Damaged, NewerFormat."""
    return Run(Catalog(open_storage(os.fspath(root)), writer="reader"))

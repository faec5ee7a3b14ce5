"""Checkpoint orchestrator for multi-process JAX jobs. Start with `Agent`; read-only users with `open_run`.

Names are imported when they are first used: reading a run's journal needs no JAX, and `orchestrator ls` starts at once.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from orchestrator.job.last_words import install

if TYPE_CHECKING:
    from orchestrator.agent import Agent
    from orchestrator.errors import (
        Damaged,
        Fenced,
        JournalLost,
        Mismatch,
        NewerFormat,
        NotARun,
        NothingToRestore,
        OrchestratorError,
        OtherJob,
        OutcomeUnknown,
        RootChanged,
        SaveFailed,
        StepNotFound,
        StepRetired,
        StorageError,
        Unavailable,
        UnsafeKey,
        UnsupportedLeaf,
        UsageError,
        WaitTimeout,
    )
    from orchestrator.job.read_step import Restored
    from orchestrator.options import Options
    from orchestrator.policy import at, auto, best, every, every_nth, every_seconds, last, within
    from orchestrator.reader import Run
    from orchestrator.rules.save_interval import Cadence

_HOMES = {
    "agent": ("Agent",),
    "rules.save_interval": ("Cadence",),
    "errors": (
        *("Damaged", "Fenced", "Mismatch", "NewerFormat", "NotARun", "NothingToRestore", "OrchestratorError"),
        *("OtherJob", "OutcomeUnknown", "SaveFailed", "StepNotFound", "StorageError", "UnsafeKey", "UnsupportedLeaf"),
        *("JournalLost", "RootChanged", "StepRetired", "Unavailable", "UsageError", "WaitTimeout"),
    ),
    "options": ("Options",),
    "policy": ("at", "auto", "best", "every", "every_nth", "every_seconds", "last", "within"),
    "reader": ("Run",),
    "job.read_step": ("Restored",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Agent",
    "Cadence",
    "Damaged",
    "Fenced",
    "JournalLost",
    "Mismatch",
    "NewerFormat",
    "NotARun",
    "NothingToRestore",
    "Options",
    "OrchestratorError",
    "OtherJob",
    "OutcomeUnknown",
    "Restored",
    "RootChanged",
    "Run",
    "SaveFailed",
    "StepNotFound",
    "StepRetired",
    "StorageError",
    "Unavailable",
    "UnsafeKey",
    "UnsupportedLeaf",
    "UsageError",
    "WaitTimeout",
    "at",
    "auto",
    "best",
    "every",
    "every_nth",
    "every_seconds",
    "last",
    "open_run",
    "within",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
    install()
    return getattr(importlib.import_module(f"orchestrator.{_HOME_OF[name]}"), name)


def open_run(root: str | os.PathLike[str]) -> Run:
    """Open a run for reading. Writes nothing. Raises NotARun, Damaged, NewerFormat."""
    from orchestrator.reader import Run
    from orchestrator.run.journal_store import Catalog
    from orchestrator.storage import open_storage
    from orchestrator.storage.read_only import ReadOnlyStorage

    install()
    return Run(Catalog(ReadOnlyStorage(open_storage(root)), writer="reader"))

"""Checkpoint orchestrator for multi-process JAX jobs. Start with `Agent`; read-only users with `open_run`.

    import orchestrator as oc

    with oc.Agent("my-run", save=oc.every(100) | oc.every_seconds(600), keep=oc.last(5) | oc.best("loss")) as agent:
        restored = agent.restore(like)     # None in a new run
        agent.save(step, state, metrics={"loss": loss})

When to save: every, every_seconds, at, auto, continuous. What to keep: last, every_nth, best, within. Combined by `|`.
What to hold in memory between saves, for a quick restart: tiers=[oc.memory(every=20)].
"""

# Names are imported when they are first used: reading a run's journal needs no JAX, and `orchestrator ls` starts at
# once. What this file needs itself begins with _: whoever presses Tab after `oc.` sees the public names only.
import ast as _ast
import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

from orchestrator.job.peer_failure import install_excepthook as _install_excepthook

# The one list of what is imported on first use: type checkers follow it, and `_homes` reads it out of this file.
if TYPE_CHECKING:
    # Not sorted: that would make a statement of each name.
    # isort: off
    from orchestrator.agent import Agent as Agent
    from orchestrator.errors import (
        Damaged as Damaged,
        Fenced as Fenced,
        JournalLost as JournalLost,
        Mismatch as Mismatch,
        NewerFormat as NewerFormat,
        NotARun as NotARun,
        NothingToRestore as NothingToRestore,
        OrchestratorError as OrchestratorError,
        OtherJob as OtherJob,
        OutcomeUnknown as OutcomeUnknown,
        RootChanged as RootChanged,
        SaveFailed as SaveFailed,
        StepNotFound as StepNotFound,
        StepRetired as StepRetired,
        StorageError as StorageError,
        Unavailable as Unavailable,
        UnsafeKey as UnsafeKey,
        UnsupportedLeaf as UnsupportedLeaf,
        UsageError as UsageError,
        WaitTimeout as WaitTimeout,
    )
    from orchestrator.job.joining import initialize as initialize
    from orchestrator.job.read_step import Restored as Restored
    from orchestrator.options import Options as Options
    from orchestrator.policy import (
        at as at,
        auto as auto,
        best as best,
        continuous as continuous,
        every as every,
        every_nth as every_nth,
        every_seconds as every_seconds,
        last as last,
        within as within,
    )
    from orchestrator.reader import Run as Run, open_run as open_run
    from orchestrator.rules.save_interval import Cadence as Cadence
    from orchestrator.rules.tiers import memory as memory

    # isort: on
    __version__: str


def _homes() -> dict[str, str]:
    """The module of each name that is imported on first use."""
    with open(__file__, encoding="utf-8") as file:
        body = _ast.parse(file.read()).body
    (listed,) = (node for node in body if isinstance(node, _ast.If) and _ast.unparse(node.test) == "TYPE_CHECKING")
    imports = (node for node in listed.body if isinstance(node, _ast.ImportFrom))
    return {alias.name: node.module or "" for node in imports for alias in node.names}


_HOME_OF = _homes()
__all__ = sorted(_HOME_OF)


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("checkpoint-orchestrator")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "0+not-installed"


if not TYPE_CHECKING:  # to a type checker, any name at all would be one of ours

    def __getattr__(name: str) -> _Any:
        if name == "__version__":
            return _version()
        if name not in _HOME_OF:
            raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
        _install_excepthook()
        return getattr(_importlib.import_module(_HOME_OF[name]), name)

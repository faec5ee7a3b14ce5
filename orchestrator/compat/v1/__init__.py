"""Orbax's v1 API, kept by an agent: `from orchestrator.compat import v1 as ocp` moves an existing loop over.

What saves, loads and describes checkpoints is ours: `training.Checkpointer` for the steps of a run, and `save`, `load`
and the like for one checkpoint at a path. Types, options, policies and handlers are Orbax's own, handed through by
name. Nothing else is: what has no counterpart raises an AttributeError that says so.
"""

from typing import Any

from orchestrator.arrays.format import orbax_v1
from orchestrator.compat.v1 import training
from orchestrator.compat.v1.checkpoints import (
    checkpointables_metadata,
    is_orbax_checkpoint,
    load,
    load_async,
    load_checkpointables,
    load_checkpointables_async,
    load_pytree,
    load_pytree_async,
    metadata,
    pytree_metadata,
    save,
    save_async,
    save_checkpointables,
    save_checkpointables_async,
    save_pytree,
    save_pytree_async,
)

__all__ = [
    "checkpointables_metadata",
    "is_orbax_checkpoint",
    "load",
    "load_async",
    "load_checkpointables",
    "load_checkpointables_async",
    "load_pytree",
    "load_pytree_async",
    "metadata",
    "pytree_metadata",
    "save",
    "save_async",
    "save_checkpointables",
    "save_checkpointables_async",
    "save_pytree",
    "save_pytree_async",
    "training",
]

_HANDED_THROUGH = (
    *("AbstractCheckpointable", "AsyncResponse", "CheckpointMetadata", "Checkpointable", "CheckpointableHandler"),
    *("Context", "PLACEHOLDER", "PyTreeMetadata", "StatefulCheckpointable"),
    *("arrays", "errors", "handlers", "multihost", "options", "path", "tree"),
)
_INSTEAD = {
    "delete": "delete the run's directory, or use training.Checkpointer.delete(step)",
    "delete_async": "delete the run's directory, or use training.Checkpointer.delete(step)",
    "partial": "a checkpoint is committed whole: save it with save, or as steps with training.Checkpointer",
}


def __getattr__(name: str) -> Any:
    if name in _HANDED_THROUGH:
        return orbax_v1.public(name)
    instead = _INSTEAD.get(name)
    raise AttributeError(
        f"orchestrator.compat.v1.{name} is not supported; {instead}"
        if instead
        else f"module {__name__!r} has no attribute {name!r}"
    )

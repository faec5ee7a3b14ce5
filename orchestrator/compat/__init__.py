"""Orbax's CheckpointManager, kept by an agent: `import orchestrator.compat as ocp` moves an existing loop over.

`CheckpointManager` is ours (`manager`), and so is the newer API (`v1`); every other name (`ocp.args`,
`ocp.CheckpointManagerOptions`, ...) is Orbax's own. So nothing here, not even a module, may have a further name of
Orbax's: it would hide that.
"""

import importlib
from types import SimpleNamespace
from typing import Any

from orchestrator.arrays.format import orbax_api
from orchestrator.compat.manager import CheckpointManager

__all__ = ["CheckpointManager", "__getattr__"]


def __getattr__(name: str) -> Any:
    if name in ("v1", "experimental"):  # imported where it is used: not every Orbax that we take has it
        v1 = importlib.import_module("orchestrator.compat.v1")
        return v1 if name == "v1" else SimpleNamespace(**{**vars(orbax_api.public(name)), "v1": v1})
    return orbax_api.public(name)

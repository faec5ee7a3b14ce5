"""Orbax's CheckpointManager, kept by an agent: `import orchestrator.compat as ocp` moves an existing loop over.

`CheckpointManager` is ours (`orbax_manager`); every other name (`ocp.args`, `ocp.CheckpointManagerOptions`, ...) is
Orbax's own. So this module may define no further public name: it would hide Orbax's.
"""

from orchestrator.arrays.format.orbax_api import public as __getattr__
from orchestrator.compat.manager import CheckpointManager

__all__ = ["CheckpointManager", "__getattr__"]

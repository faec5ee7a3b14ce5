"""Orbax's CheckpointManager, kept by an agent: `import orchestrator.compat as ocp` moves an existing loop over.

`CheckpointManager` is ours (`manager`); every other name (`ocp.args`, `ocp.CheckpointManagerOptions`, ...) is Orbax's
own. So nothing here, not even a module, may have a further name of Orbax's: it would hide that.
"""

from orchestrator.arrays.format.orbax_api import public as __getattr__
from orchestrator.compat.manager import CheckpointManager

__all__ = ["CheckpointManager", "__getattr__"]

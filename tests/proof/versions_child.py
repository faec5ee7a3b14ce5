"""One environment's part in tests/proof/versions.py: writes a checkpoint of everything, or restores others'.

    python -m tests.proof.versions_child write ROOT
    python -m tests.proof.versions_child restore ROOT ...

Beside each root lies ROOT.json: the bits that were saved. Prints a line of JSON for each root.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import orchestrator as oc
from tests.support.leaf_table import ON_HOST
from tests.support.leaf_values import DTYPES, X64_DTYPES, bits, every_pattern

EXTRA: dict[str, Any] = {"tokens": 2**60, "name": "Grüße", "nested": [{"a": None}, 0.1, True]}
METRICS = {"loss": 0.1, "accuracy": 1.0}
PROCESS_STATE = bytes(range(256))
STEP = 7


def state(columns: int) -> dict[str, Any]:
    """The same values always; on a mesh of 4 devices with so many columns."""
    mesh = Mesh(np.array(jax.devices()).reshape(-1, columns), ("rows", "columns"))
    over = NamedSharding(mesh, PartitionSpec("rows", "columns"))
    wide = np.random.default_rng(1).integers(0, 1 << 32, (256, 128), np.uint32)
    return {
        "dtypes": {name: jnp.asarray(every_pattern(name)) for name in DTYPES if hasattr(jnp, name)},
        "sharded": {
            "float32": jax.device_put(wide.view(np.float32), over),
            "bfloat16": jax.device_put(wide.astype(np.uint16).view(jnp.bfloat16), over),
            "int4": jax.device_put((wide % 16).astype(np.int8).astype(jnp.int4), over),
        },
        "scalar": jnp.float32(0.1),
        "key": jax.random.key(3),
        "numpy": {name: every_pattern(name) for name in (*DTYPES, *X64_DTYPES)},
        "host": ON_HOST,
    }


def described(tree: Any) -> dict[str, str]:
    return {jax.tree_util.keystr(path): repr(bits(native(leaf))) for path, leaf in jax.tree.leaves_with_path(tree)}


def native(leaf: Any) -> Any:
    """Byte order is not kept: arrays come back in the machine's."""
    return leaf.astype(leaf.dtype.newbyteorder("=")) if isinstance(leaf, np.ndarray) else leaf


def write(root: Path) -> None:
    saved = state(columns=1)
    with oc.Agent(root, options=oc.Options(attest="full", on_save_failure="raise")) as agent:
        agent.save(STEP, saved, metrics=METRICS, extra=EXTRA, process_state=PROCESS_STATE)
    root.with_suffix(".json").write_text(json.dumps(described(saved)))


def wrong(root: Path) -> str | None:
    """How what this environment makes of the checkpoint differs from what was saved; None: in nothing."""
    wanted = json.loads(root.with_suffix(".json").read_text())
    with oc.Agent(root, options=oc.Options(attest="full")) as agent:
        restored = agent.restore(state(columns=2))
    if restored is None or restored.step != STEP:
        return f"restored {restored!r}"
    got = described(restored.state)
    for name in sorted({*wanted, *got}):
        if got.get(name) != wanted.get(name):
            return f"{name}: {str(got.get(name))[:80]}, saved as {str(wanted.get(name))[:80]}"
    extra = {name: value for name, value in restored.extra.items() if name != "timestamp"}
    if (extra, restored.metrics, restored.process_states) != (EXTRA, METRICS, {0: PROCESS_STATE}):
        return f"extra {extra}, metrics {restored.metrics}, process states {restored.process_states}"
    without_target = oc.open_run(root).restore().state["sharded"]
    for name, array in restored.state["sharded"].items():
        if np.asarray(without_target[name]).tobytes() != np.asarray(array).tobytes():
            return f"sharded/{name} is another without a target"
    return None


def main(what: str, *roots: str) -> None:
    for root in map(Path, roots):
        try:
            problem = write(root) if what == "write" else wrong(root)
        except Exception as error:  # said in the table, beside the others
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps({"root": str(root), "problem": problem}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

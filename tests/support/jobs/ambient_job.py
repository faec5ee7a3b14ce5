"""Two processes of two devices that save, restore and meet under settings of JAX: each with and without `load_once`.

python ambient_job.py INDEX COUNT PORT ROOT
Prints one JSON object a line: the setting, and what is wrong under it.
"""

# ruff: noqa: E402  (JAX is configured from the arguments, so it is imported after them)
import json
import os
import sys

index, count, port, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ["ORCHESTRATOR_HOST_NAME"] = f"host-{index}"

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_platforms", "cpu")
where = f"127.0.0.1:{port}"
jax.distributed.initialize(where, count, index, coordinator_bind_address=where)

import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import orchestrator as oc
from tests.support.ambient import AMBIENT, mesh_of, settings_now

SETTINGS = [  # "set_mesh(another)" is of devices that not all processes have
    *("set_mesh(Auto)", "set_mesh(Explicit)", "transfer_guard(disallow)", "disable_jit", "enable_x64"),
    *("promotion strict", "debug_nans", "process-wide transfer guard", "process-wide disable_jit"),
]
table = np.arange(1 << 19, dtype=np.float32).reshape(512, 1024)
table[3, 5] = np.nan


def placed(kind: AxisType, spec: PartitionSpec) -> jax.Array:
    return jax.make_array_from_callback(table.shape, NamedSharding(mesh_of(kind), spec), lambda at: table[at])


def wrong(restored: jax.Array, spec: PartitionSpec) -> bool:
    parts = [np.asarray(shard.data).tobytes() == table[shard.index].tobytes() for shard in restored.addressable_shards]
    return restored.sharding.spec != spec or not all(parts)


def tried(kind: AxisType, name: str, once: bool) -> str:
    rows, whole, both = PartitionSpec("data"), PartitionSpec(), PartitionSpec("data", "model")
    state = {"rows": placed(kind, rows), "whole": placed(kind, whole), "count": 3, "numpy": np.arange(3)}
    like = {
        **state,
        "rows": jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=NamedSharding(mesh_of(kind), both)),
    }
    options = oc.Options(
        attest="full",
        load_once=once,
        async_save=False,
        on_save_failure="raise",
        save_timeout_s=60,
        rendezvous_timeout_s=60,
    )
    with AMBIENT[name]():
        before = settings_now()
        with oc.Agent(f"{root}/{kind.name} {name} {once}", save=oc.every_seconds(0.001), options=options) as agent:
            if not agent.save(1, state):
                return "not saved"
            restored = agent.restore(like)
            if agent.reached_preemption(2):
                return "preempted"
        if settings_now() != before:
            return "the setting is another one"
    assert restored is not None
    if wrong(restored.state["rows"], both) or wrong(restored.state["whole"], whole) or restored.state["count"] != 3:
        return "wrong values"
    return ""


for kind in (AxisType.Auto, AxisType.Explicit):
    for name in SETTINGS:
        for once in (False, True):
            if kind is AxisType.Auto or "mesh" in name:
                print(
                    json.dumps({"setting": f"{kind.name} {name} {once}", "wrong": tried(kind, name, once)}), flush=True
                )
print(json.dumps({"setting": "done", "wrong": ""}), flush=True)

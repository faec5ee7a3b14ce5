"""Two processes of two devices save and restore every kind of leaf on every kind of place (`leaf_table`).

python leaves_job.py INDEX COUNT DEVICES PORT ROOT
Each row is a run of its own below ROOT. Prints one JSON object a line: `event` is the row's name.
"""

# ruff: noqa: E402  (JAX is configured from the arguments, so it is imported after them)
import json
import os
import sys

index, count, devices, port, root = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
os.environ["ORCHESTRATOR_HOST_NAME"] = f"host-{index}"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_platforms", "cpu")
where = f"127.0.0.1:{port}"
jax.distributed.initialize(where, count, index, coordinator_bind_address=where)

import orchestrator as oc
from orchestrator.observe import events
from tests.support import leaf_table

STAGES = (
    "but_first",
    "but_first_replicated",
    "stage0",
    "stage1",
    "stage0_replicated",
    "stage1_replicated",
    "device_of0",
    "device_of1",
)
differing: list[str] = []
failed: list[str] = []
told = {events.HostLocalDiffers: differing, events.SaveNotCommitted: failed}
events.subscribe(lambda event: told.get(type(event), []).append(getattr(event, "reason", "")))


def say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, "process": index, **more}), flush=True)


def agent(row: str, **options: object) -> oc.Agent:
    return oc.Agent(f"{root}/{row}", options=oc.Options(save_timeout_s=60, rendezvous_timeout_s=60, **options))


def saved(saver: oc.Agent, *states: object, since: int = 1) -> dict[str, object]:
    """What came of saving these states, one after the other."""
    differing.clear()
    failed.clear()
    for step, state in enumerate(states, since):
        saver.save(step, state)
        saver.wait_until_finished()
    return {"steps": saver.all_steps(), "differing": list(differing), "failed": list(failed)}


places = leaf_table.places(count)


def every_place(row: str, kinds: tuple[str, ...], **options: object) -> None:
    """All places, saved twice (a form that is new, and one that is known), and restored as they were."""
    state = leaf_table.state(places, kinds)
    like = leaf_table.state(places, kinds, leaf_table.target)
    with agent(row, **options) as saver:
        outcome = saved(saver, state, state)
        restored = saver.restore(like)
        say(row, **outcome, wrong=leaf_table.wrong(restored.state, like))


every_place("all", tuple(leaf_table.KINDS))
every_place("attested", leaf_table.ATTESTED, attest="full")

# The stages elsewhere: swapped, on one mesh of all devices, and all of them as each process's own.
turned = {"stage0": "stage1", "stage1": "stage0"}
for row, elsewhere in {
    "swapped": lambda place: places[turned[place[:6]] + place[6:]] if place[:6] in turned else places["device_of0"],
    "merged": lambda place: places["global"],
    "everywhere": lambda place: places["replicated"],
    "own": lambda place: places["local"],
}.items():
    where_to = {place: elsewhere(place) for place in STAGES}
    like = leaf_table.state(where_to, leaf_table.ATTESTED, leaf_table.target)
    reader = agent("attested", attest="full", load_once=row in ("merged", "everywhere"))
    with reader:
        restored = reader.restore(like, partial=True)
        say(row, wrong=leaf_table.wrong(restored.state, like))

# What each host has its own of, and not all have the same.
mine = {
    "array": jnp.full(3, index),
    "large": jnp.full((256, 256), index, jnp.float32),
    "rows": jax.device_put(np.arange(8) + index, places["local_rows"]),
    "key": jax.random.key(index),
    "numpy": np.full(3, index),
    "int": index,
    "str": f"host {index}",
}
same = {
    "array_too": jnp.full(3, 5),
    "rows_too": jax.device_put(np.arange(8), places["local_rows" if index else "local"]),
    "key_too": jax.random.key(5),
    "numpy_too": np.full(3, 5),
    "float_too": float("nan"),
}
shared = {"w": leaf_table.array("global-f32", "f32", places["global"])}
for row, option in {"warned": "warn", "refused": "error", "ignored": "ignore"}.items():
    attest = "save" if row == "warned" else "off"  # these are no replicas, which would have to agree
    with agent(row, host_local=option, attest=attest, compression=row == "refused") as saver:
        say(row, **saved(saver, {**shared, **mine, **same}, {**shared, **mine, **same}), failures=saver.failures)
with agent("agreed", host_local="error", compression=True) as saver:
    say("agreed", **saved(saver, {**shared, **same}))

# What is donated or overwritten as soon as `save` returns is compared as it was.
with agent("donated", host_local="error") as saver:
    for step in range(1, 5):
        loose = {
            "x": jnp.full((512, 256), step, jnp.float32),
            "n": np.full(1 << 16, step),
            "rows": same["rows_too"] + step,
        }
        saver.save(step, {**shared, **loose})
        after = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 7, tree), donate_argnums=0)(
            {"x": loose["x"], "rows": loose["rows"]}
        )
        loose["n"][:] = -index
        jax.block_until_ready(after)
    saver.wait_until_finished()
    say("donated", steps=saver.all_steps(), failures=saver.failures)

# Leaves that the processes have on different devices: rejected by name; and the next save is good.
stage1 = leaf_table.array("stage1-f32", "f32", places["stage1"])
local = leaf_table.array("stage1-f32", "f32", places["stage1"] if index else places["local"])
host = leaf_table.bits("global-f32", "f32")
with agent("apart") as saver:
    bad = {"x": host if index == 0 else shared["w"], "y": shared["w"]}
    worse = {"x": shared["w"] if index == 0 else host, "y": stage1}
    say("apart", **saved(saver, bad, worse, {"x": shared["w"], "y": stage1}))
# To process 1 it is the same array all the time; on process 0 it is once its own, then process 1's.
with agent("moved") as saver:
    say("moved", **saved(saver, {"x": local}, {"x": stage1}, {"x": stage1}, {"x": stage1}))
    like = {"x": leaf_table.target("stage1-f32", "f32", places["stage1"])}
    value = saver.restore(like).state["x"]
    say(
        "moved_back",
        same=[
            np.asarray(one.data).tolist() == host_rows.tolist()
            for one, host_rows in zip(
                value.addressable_shards, np.split(leaf_table.bits("stage1-f32", "f32"), 2), strict=False
            )
        ],
    )

# A state that is new to process 1, which waits for a step that process 0 does not save.
with agent("steps", other_tree=True) as saver:
    saved(saver, {"n": np.arange(3)})
    first = saved(saver, {"n": np.arange(4 + index)}, since=10 + index)
    say("steps", **saved(saver, {"n": np.arange(3)}, since=20), before=first["failed"])


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.dropout = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


state = nnx.state(Model(nnx.Rngs(0)))
with agent("nnx", host_local="error") as saver:
    outcome = saved(saver, state, state)
    restored = saver.restore(nnx.state(Model(nnx.Rngs(1))))
    equal = jax.tree.map(lambda one, other: bool((jnp.asarray(one == other)).all()), state, restored.state)
    say("nnx", **outcome, equal=jax.tree.leaves(equal))
say("done")

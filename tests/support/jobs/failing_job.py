"""A program as the README shows it, under a launcher or with `jax.distributed.initialize`, that fails on one host.

argv: root, the process that fails, where the others are then ("collective", "apart"); without a launcher also this
process's index, how many there are, and the coordination service's port.
"""

from __future__ import annotations

import os
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

root, failing, others = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if "ORCHESTRATOR_PROCESS_COUNT" in os.environ:
    from launch import contract

    job = contract.from_environment(os.environ)
    assert job is not None
    contract.initialize(job)
else:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    index, count, port = map(int, sys.argv[4:])
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, local_device_ids=())

import orchestrator as oc  # noqa: E402  # the way to write it where JAX must be initialized first

me = jax.process_index()
rows = NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), PartitionSpec("data"))
like = {"w": jax.ShapeDtypeStruct((12 * jax.device_count(),), jnp.float32, sharding=rows)}
train_step = jax.jit(lambda state: ({"w": state["w"] + 1}, state["w"].sum()))

# Whoever waited for that long would be seen: nothing here needs it.
with oc.Agent(root, save=oc.every(2), options=oc.Options(failure_grace_s=1000.0)) as agent:
    restored = agent.restore(like)
    state = restored.state if restored else {"w": jnp.zeros(like["w"].shape, device=rows)}
    for step in range(restored.step + 1 if restored else 0, 1000):
        state, loss = train_step(state)
        agent.save(step, state)
        if step == 4 and me == failing:
            if others == "collective":
                raise oc.Fenced("fenced by epoch 9 (another job)")
            raise SystemExit(3)
        if step == 4 and others == "apart":
            if me == 1:
                agent.close()  # waits for the one that has failed
            time.sleep(600)
        loss.block_until_ready()
        if agent.reached_preemption(step):
            break

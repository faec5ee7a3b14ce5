"""How much memory the first step that donates a restored state needs beside it, on CPU devices: nothing, if the step
can reuse the state's own.

    python -m benchmarks.donating          # 512 MiB in 16 arrays, on 2 devices

JSON lines: `grown` is the growth of the process's peak of resident memory during the step, over the state's bytes;
`reused`, how much of the state's memory the new state is in. The last line is the same step on arrays that JAX was
given as numpy memory, which XLA's CPU client does not reuse: later arrays may lie where earlier ones were freed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from benchmarks import jobs
from benchmarks.worker import give_back, peak, reset_peak

FIGURE = "first donating step"
ROUNDS, DEVICES, ARRAYS, SHAPE = 7, 2, 16, (8192, 1024)


def target() -> dict[str, Any]:
    sharding = NamedSharding(jax.make_mesh((DEVICES,), ("data",)), PartitionSpec("data"))
    return {f"layer_{at:02}": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding) for at in range(ARRAYS)}


def addresses(state: dict[str, Any]) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for leaf in state.values() for shard in leaf.addressable_shards}


def run(step: Any, state: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures of one step, and the state that it made."""
    held = addresses(state)
    size = sum(leaf.nbytes for leaf in state.values())
    gc.collect()
    give_back(0)
    before = reset_peak()
    state = jax.block_until_ready(step(state))
    more = (peak() - before) / size
    return {"grown": round(more, 4), "reused": len(addresses(state) & held) / len(held)}, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--directory", type=jobs.directory, help="where to write")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    like = target()
    # Compiled beforehand: what the compiler needs is not the step's.
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0).lower(like).compile()
    saved = {name: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in like.items()}
    found: list[float] = []
    with tempfile.TemporaryDirectory(dir=args.directory) as root, oc.Agent(f"{root}/run") as agent:
        agent.save(1, saved)
        agent.wait_until_finished()
        del saved
        for number in range(1, args.rounds + 1):
            restored = agent.restore(like)
            assert restored is not None
            state = restored.state
            del restored
            figures, state = run(step, state)
            assert np.asarray(state["layer_00"].addressable_shards[0].data)[0, 0] == 1.0
            found.append(figures["grown"])
            print(json.dumps({"figure": FIGURE, **figures, "round": number}), flush=True)
            del state
    print(json.dumps({"figure": f"{FIGURE}, median", "rounds": len(found), "median": statistics.median(found)}))
    numpy = {name: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in like.items()}
    for leaf in numpy.values():
        leaf.block_until_ready()
    print(json.dumps({"figure": f"{FIGURE}, of numpy memory", **run(step, numpy)[0]}))


if __name__ == "__main__":
    main()

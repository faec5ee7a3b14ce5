"""Grain: each process reads its share of the data and saves its iterator's position beside the state; a job that comes
back on another number of processes goes on with exactly the examples that it had not seen. Needs the package `grain`.

orchestrator launch local --processes 2 -- python train.py --root=/tmp/run --steps=10
orchestrator launch local --processes 1 -- python train.py --root=/tmp/run --steps=20
"""

import argparse
import json
from collections.abc import Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import orchestrator as oc

BATCH = 24  # of all processes together


def reader(process: int, count: int) -> grain.DatasetIterator:
    """Process `process`'s share of each global batch: shuffle first, then slice, and batch last. So a position counts
    global batches, and means the same on any number of processes."""
    examples = grain.MapDataset.range(100).shuffle(seed=7).repeat()[process::count]
    return iter(examples.map(lambda number: {"id": np.int32(number)}).batch(BATCH // count).to_iter_dataset())


def go_on(iterator: grain.DatasetIterator, states: Mapping[int, bytes], process: int, count: int) -> None:
    """Put the iterator where the saving processes were. On as many processes as before, each takes its own position;
    on another number all positions must be the same. Raises oc.UsageError."""
    if len(states) == count:
        body = states[process]
    elif len(set(states.values())) == 1:
        body = states[0]
    else:
        raise oc.UsageError(f"{len(states)} processes saved different positions; restore on as many, not {count}")
    iterator.set_state(json.loads(body))


def main(root: str, steps: int) -> dict[str, object]:
    process, count = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    like = {"seen": jax.ShapeDtypeStruct((100,), jnp.int32, sharding=whole)}
    train_step = jax.jit(lambda state, ids: {"seen": state["seen"].at[ids].add(1)}, out_shardings={"seen": whole})

    iterator = reader(process, count)
    with oc.Agent(root, save=oc.every(1), keep=oc.last(2)) as agent:
        restored = agent.restore(like)
        if restored:
            state, start = restored.state, restored.step + 1
            go_on(iterator, restored.process_states, process, count)
        else:
            state, start = {"seen": jnp.zeros(100, jnp.int32, device=whole)}, 0
        batches = {}
        for step in range(start, steps):
            ids = next(iterator)["id"]
            batches[step] = ids.tolist()
            state = train_step(state, jax.make_array_from_process_local_data(rows, ids))
            agent.save(step, state, process_state=json.dumps(iterator.get_state()).encode())
            if agent.reached_preemption(step):
                break
    return {"start": start, "batches": batches, "seen": np.asarray(state["seen"]).tolist()}


if __name__ == "__main__":
    oc.initialize()  # joins the other processes under a launcher; does nothing when alone
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=10)
    print(main(**vars(parser.parse_args())), flush=True)

"""A job of N processes whose state at each step is a known function of the step: restored bits can be checked anywhere.

python state_job.py INDEX COUNT DEVICES PORT ROOT [key=value ...]
    mesh=4x2       shape over (data, model)
    spec=dm|md|r   how the big array is sharded; r: replicated
    steps=N        train N further steps (0: only restore), one save each
    delay=S        seconds per step
    fail=I         process I cannot write (a file stands where its data directory should be)
    timeout=S      save_timeout_s
    attest=full    Options.attest
    flip=I@N       at step N one bit of `bias` is wrong on the last device of process I
    swap=1         the restore reads with an axis swapped, and large arrays with two devices' parts swapped
    big=1          with an array of 128 KiB, sharded by rows
    heavy=1        with replicated and half-replicated arrays of many chunks, among them NaNs of all kinds
    turned=1       which are sharded in other ways, by columns for one
    part=1         one of which only half of the devices want
    once=1         Options.load_once
    group=N        of so many bytes on each device are the groups that are read once together
    meet=S         rendezvous_timeout_s
    differ=1       process 1 asks for another sharding of one of them
    odd=I          restore nothing; at step 0 process I gives something that is no metrics
    resave=1       save what was restored once more, one step later
    auto=S         save at the interval of oc.auto(max_loss_s=S), not at every step
    every=N        save every N steps, not at every one
    tier=DIR       hold steps in memory, in a directory of each process's own below DIR
    shared=1       in DIR itself: one host
    hosts=N        on so many hosts, process I on host I modulo N
    copies=N       on other hosts
    hold=N         every N steps (2)
    full=I         process I has no room there
    room=N         a host may hold so many bytes
    upload=N       so many bytes a second go from there to the store
Prints one JSON object a line; `event` says what.
"""

# ruff: noqa: E402  (JAX is configured from the arguments, so it is imported after them)
import json
import os
import sys
import time

index, count, devices, port, root = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
args = dict(item.split("=", 1) for item in sys.argv[6:])
os.environ["ORCHESTRATOR_HOST_NAME"] = f"host-{index}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", devices)
jax.config.update("jax_platforms", "cpu")
if count > 1:
    where = f"127.0.0.1:{port}"
    jax.distributed.initialize(where, count, index, coordinator_bind_address=where)

import orchestrator as oc
from orchestrator import arrays
from orchestrator.arrays.reading import exchange
from orchestrator.job.read_step import ReadOptions
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.observe import events

SHAPE = (16, 8)


def say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, "process": index, **more}), flush=True)


def reference(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    bits = rng.integers(0, 2**16, SHAPE, dtype=np.uint16)
    known = {"w": rng.random(SHAPE, dtype=np.float32), "bf16": bits.view(jnp.bfloat16), "bias": rng.random(8)[:8]}
    if args.get("heavy"):
        known["heavy"] = rng.integers(0, 2**32, (4096, 1024), dtype=np.uint32).view(np.float32)  # NaNs, -0.0, all bits
        known["heavy_bf16"] = rng.integers(0, 2**16, (2048, 2048), dtype=np.uint16).view(jnp.bfloat16)
        known["heavy_bool"] = rng.integers(0, 2, (4096, 2048), dtype=np.uint8).astype(bool)
        # Three chunks, and one: no number of devices that is here divides them.
        known["heavy_odd"] = rng.integers(0, 2**16, (3, 700_004), dtype=np.uint16).view(jnp.bfloat16)
        known["heavy_int4"] = rng.integers(-8, 8, (1, 2_000_004), dtype=np.int8).astype(jnp.int4)
    return known | ({"big": rng.random((512, 64), dtype=np.float32)} if args.get("big") else {})


data, model = (int(size) for size in args.get("mesh", f"{count * devices}x1").split("x"))
mesh = jax.make_mesh((data, model), ("data", "model"))
spec = {"dm": PartitionSpec("data", "model"), "md": PartitionSpec("model", "data"), "r": PartitionSpec()}[
    args.get("spec", "dm")
]
rows = PartitionSpec() if args.get("spec") == "r" else PartitionSpec(("data", "model"))
shardings = {
    "w": NamedSharding(mesh, spec),
    "bf16": NamedSharding(mesh, rows),
    "bias": NamedSharding(mesh, PartitionSpec()),
    "big": NamedSharding(mesh, rows),
    "heavy": NamedSharding(mesh, PartitionSpec()),
    "heavy_bf16": NamedSharding(mesh, PartitionSpec(None, "model")),
    "heavy_bool": NamedSharding(mesh, PartitionSpec("model")),
    "heavy_odd": NamedSharding(mesh, PartitionSpec()),
    "heavy_int4": NamedSharding(mesh, PartitionSpec()),
}
if args.get("turned"):
    columns = NamedSharding(mesh, PartitionSpec(None, ("data", "model")))
    shardings |= dict.fromkeys(("heavy", "heavy_odd", "heavy_int4"), columns)
    shardings["heavy_bf16"] = NamedSharding(mesh, PartitionSpec("model"))
    shardings["heavy_bool"] = NamedSharding(mesh, PartitionSpec("model", "data"))
if args.get("part"):
    half = jax.sharding.Mesh(jax.devices()[: count * devices // 2], ("half",))
    shardings["heavy_int4"] = NamedSharding(half, PartitionSpec(None, "half"))
exchange.GROUP_BYTES = int(args.get("group", exchange.GROUP_BYTES))


def state_at(step: int) -> dict[str, object]:
    arrays = {
        name: jax.make_array_from_callback(
            value.shape,
            shardings[name],
            lambda at, value=value: value[at],
            dtype=jax.dtypes.canonicalize_dtype(value.dtype),
        )
        for name, value in reference(step).items()
    }
    return {**arrays, "host_local": jnp.float32(step), "numpy": np.arange(step, step + 3), "count": step}


def wrong_bits(step: int, state: dict[str, object]) -> list[str]:
    wrong = []
    for name, value in reference(step).items():
        for shard in state[name].addressable_shards:
            if np.asarray(shard.data).tobytes() != value.astype(state[name].dtype)[shard.index].tobytes():
                wrong.append(name)
    if state["count"] != step or not np.array_equal(state["numpy"], np.arange(step, step + 3)):
        wrong.append("values")
    return wrong


def with_a_wrong_bit(array: jax.Array) -> jax.Array:
    """One replica of a replicated array changed by one bit, as a device that computes wrongly would do it."""
    parts = [shard.data for shard in array.addressable_shards]
    body = np.array(parts[-1])
    body.view(np.uint8)[5] ^= 1
    parts[-1] = jax.device_put(body, parts[-1].devices().pop())
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def swapped(*arguments: object) -> list[object]:
    """A reader that takes the axes in the wrong order: every byte and checksum is right."""
    directory, loads, *more = arguments

    def turned(load: arrays.ReadRequest, value: object) -> object:
        if load.frame:
            one, other, *more_parts = [shard.data for shard in value.addressable_shards]
            parts = [jax.device_put(part, place.device) for part, place in zip((other, one), (one, other), strict=True)]
            return jax.make_array_from_single_device_arrays(value.shape, value.sharding, [*parts, *more_parts])
        if load.leaf.shape != SHAPE:
            return value
        (whole,) = arrays.load(directory, [arrays.ReadRequest(load.leaf)], *more)
        wrong = whole.T.reshape(SHAPE)
        return jax.make_array_from_callback(SHAPE, value.sharding, lambda at: wrong[at])

    return [turned(load, value) for load, value in zip(loads, arrays.load(*arguments), strict=True)]


like = {
    name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding) if name in shardings else value
    for name, value in state_at(0).items()
}
options = oc.Options(
    save_timeout_s=float(args.get("timeout", 30)),
    rendezvous_timeout_s=float(args.get("meet", 30)),
    attest=args.get("attest", "off"),
    load_once=bool(args.get("once")),
    upload_bytes_per_s=int(args["upload"]) if "upload" in args else None,
)
tiers = []
if "tier" in args:
    own = args["tier"] if args.get("shared") else f"{args['tier']}/host-{index % int(args.get('hosts', count))}"
    os.makedirs(own, exist_ok=True)
    room = 1000 if args.get("full") == str(index) else int(args["room"]) if "room" in args else None
    copies = {"copies": int(args["copies"])} if "copies" in args else {}
    tiers = [oc.memory(every=int(args.get("hold", 2)), directory=own, bytes_max=room, **copies)]


def tell(event: events.Event) -> None:
    match event:
        case events.StepHeld(step=step, copies=copies, sent_bytes=sent_bytes):
            say("held", step=step, copies=copies, sent_bytes=sent_bytes)
        case events.StepNotHeld(step=step, reason=reason):
            say("not held", step=step, reason=reason)
        case events.CopyDropped(step=step, file=file, source=source):
            say("copy dropped", step=step, file=file, source=source)
        case events.HeldStepDropped(step=step, reason=reason):
            say("dropped", step=step, reason=reason)


events.subscribe(tell)
flip = tuple(map(int, args.get("flip", "-1@-1").split("@")))
try:
    save = oc.auto(float(args["auto"])) if "auto" in args else oc.every(int(args.get("every", 1)))
    keep = oc.last(int(args.get("keep", 3)))
    with oc.Agent(root, save=save, keep=keep, tiers=tiers, options=options) as agent:
        target = {**like, "count": 0}
        if args.get("differ") and index == 1:
            target["heavy"] = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=shardings["bias"])
        if args.get("swap"):
            read = ReadOptions(attest=True, reader=swapped)
            wrong = RestoreOptions(30, strict=True, load_once=bool(args.get("once")), read=read)
            restored = restore_together(agent._store, agent._rendezvous, target, wrong)
        else:
            restored = None if "odd" in args else agent.restore(like=target)
        start = 0
        if restored:
            start = restored.step + 1
            say(
                "restored",
                step=restored.step,
                wrong=wrong_bits(restored.step, restored.state),
                process_states={str(k): v.decode() for k, v in restored.process_states.items()},
                extra=restored.extra,
                sources=restored.sources,
            )
        if restored and args.get("resave"):
            agent.save(restored.step + 1, restored.state)
        for step in range(start, start + int(args.get("steps", 0))):
            if args.get("fail") == str(index):
                blocked = f"{root}/steps/{step:08d}/e{agent.epoch:04d}-a01/state/ocdbt.process_{index}"
                os.makedirs(os.path.dirname(blocked), exist_ok=True)
                open(blocked, "w").close()
            state = state_at(step)
            if (index, step) == flip:
                state["bias"] = with_a_wrong_bit(state["bias"])
            metrics = 3 if args.get("odd") == str(index) and step == 0 else None
            try:
                agent.save(
                    step, state, process_state=f"host {index} at {step}".encode(), extra={"step": step}, metrics=metrics
                )
            except oc.UsageError as error:
                say("refused", text=str(error), epoch=agent.epoch)
            if "tier" in args and count > 1:  # as the collectives of any step keep processes together
                multihost_utils.sync_global_devices(f"step {step}")
            say("trained", step=step, steps=agent.all_steps(), failures=agent.failures)
            if agent.reached_preemption(step):
                say("preempted", step=step)
                break
            time.sleep(float(args.get("delay", 0)))
        agent.wait_until_finished()
        say("done", steps=agent.all_steps(), failures=agent.failures)
except oc.OrchestratorError as error:
    say("error", kind=type(error).__name__, text=str(error))
    sys.exit(error.exit_code)

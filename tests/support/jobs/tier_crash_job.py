"""A short real run of two hosts that hold copies of each other's parts, for the crash explorer: steps that are held,
some of them saved too, and a second start, which comes back from memory. Says what process 0 is told: `held STEP`,
`saved STEP`, and `restored STEP`.

python tier_crash_job.py ROOT      the run is ROOT/run, each host's tier is ROOT/host-0 and ROOT/host-1
STARTS=1 in the environment: without the second start.
"""

# ruff: noqa: E402  (JAX is configured before it is used)
import os
import socket
import subprocess
import sys
import time

root, *which = sys.argv[1:]

if not which:
    for first in range(int(os.environ.get("STARTS", 2))):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        both = [subprocess.Popen([sys.executable, __file__, root, *map(str, (i, port, first))]) for i in (0, 1)]
        codes = [process.wait() for process in both]
        if codes != [0, 0]:
            sys.exit(f"the processes ended with {codes}")
    sys.exit(0)

index, port, start = map(int, which)
os.environ |= {"ORCHESTRATOR_HOST_NAME": f"host-{index}", "ORCHESTRATOR_DOMAIN": f"node=host-{index}"}

import jax

jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_platforms", "cpu")
where = f"127.0.0.1:{port}"
jax.distributed.initialize(where, 2, index, coordinator_bind_address=where)

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.observe import events

sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))


def state(step: int) -> dict[str, object]:
    whole = np.full(512, float(step), np.float32)
    return {"w": jax.make_array_from_callback((512,), sharding, lambda at: whole[at]), "count": step}


def hear(event: events.Event) -> None:
    if index == 0 and isinstance(event, events.StepHeld | events.SaveCommitted):
        print(f"{'held' if isinstance(event, events.StepHeld) else 'saved'} {event.step}", flush=True)


events.subscribe(hear)
place = os.path.join(root, f"host-{index}")
os.makedirs(place, exist_ok=True)
options = oc.Options(on_save_failure="raise", events_dir="")  # traced, and no part of the run
tiers = [oc.memory(every=1, keep=2, directory=place)]
agent = oc.Agent(os.path.join(root, "run"), save=oc.every(3), keep=oc.last(1), tiers=tiers, options=options)
restored = agent.restore(state(0))
if index == 0:
    print(f"restored {restored.step if restored else None}", flush=True)
assert (restored is None) == (start == 0)
begin = restored.step + 1 if restored else 0
for step in range(begin, begin + (5 if start == 0 else 2)):
    agent.save(step, state(step), process_state=b"%d at %d" % (index, step))
    agent._holding.settle()
    agent.wait_until_finished()
if start:
    agent.close()
else:
    agent.finish()  # a crash: nothing is released
left = f"{os.path.dirname(root)}/left-{start}"  # process 0 serves JAX's coordination: it leaves last
if index:
    open(left, "w").close()
while not os.path.exists(left):
    time.sleep(0.02)
sys.stdout.flush()
time.sleep(0 if index else 0.3)
os._exit(0)

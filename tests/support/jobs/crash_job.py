"""A short real run for the crash explorer: saves, retention, deletions, a pin, a quarantine, a second incarnation. Says
what it was told: `saved STEP ATTEMPT-EPOCH` once a save is reported.

python crash_job.py ROOT
"""

# ruff: noqa: E402  (JAX is configured before it is used)
import sys

import jax

jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp

import orchestrator as oc
from orchestrator.cli.main import main as command

root = sys.argv[1]


def run(steps: range) -> None:
    options = oc.Options(async_save=False, on_save_failure="raise", events_dir="")  # traced, and no part of the run
    with oc.Agent(root, keep=oc.last(2), options=options) as agent:
        restored = agent.restore({"w": jnp.zeros(512), "count": 0})
        assert (restored is None) == (steps.start == 0)
        for step in steps:
            agent.save(step, {"w": jnp.full(512, float(step)), "count": step}, process_state=b"at %d" % step)
            print(f"saved {step} {agent.epoch}", flush=True)


run(range(3))
command(["orchestrator", "pin", root, "--step=2", "--json"])
command(["orchestrator", "quarantine", root, "--step=1", "--reason=evidence", "--json"])  # retention leaves it alone
run(range(3, 6))

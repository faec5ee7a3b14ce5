"""A campaign's job: its state at each step is a known function of the step, so that restored bits can be checked.

python -m tests.proof.chaos.job ROOT STORY [key=value ...]      under a launcher (orchestrator/rules/contract.py)
    steps=N     go on to step N
    kib=K       size of the state
    delay=S     seconds per step
    deadline=S  save_timeout_s
    save=N      save every N-th step, not each
    hold=N      hold every N-th step in memory, with a copy in another rack
    jump=S      after each step the wall clock jumps by up to S seconds, forwards or back
STORY is a file outside the run; each process appends to STORY.<index> one JSON object a line, synced, so that what
the job had been told is known whatever happens to it.
"""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

from launch import contract as contracts
from tests.proof.job_story import Story, leave


class JumpingClock:
    """`time.time` as a machine shows it whose clock is set again and again. The monotonic clock is not touched."""

    def __init__(self, most_s: float, seed: int) -> None:
        self._now, self._most_s, self._random, self._offset_s = time.time, most_s, random.Random(seed), 0.0

    def __call__(self) -> float:
        return self._now() + self._offset_s

    def jump(self) -> None:
        self._offset_s += self._random.uniform(-self._most_s, self._most_s)


def main() -> int:
    root, path = sys.argv[1:3]
    args = dict(item.split("=", 1) for item in sys.argv[3:])
    contract = contracts.from_environment(os.environ)
    assert contract is not None, "start this under a launcher"
    if os.environ.get("CHAOS_STRACE", "").startswith(f"{contract.process_index}:"):
        _under_strace(os.environ.pop("CHAOS_STRACE").partition(":")[2])
    story = Story(path, contract.process_index, contract.restart_count, durable=True)
    clock = JumpingClock(float(args.get("jump", 0)), contract.process_index)
    if args.get("jump"):
        time.time = clock
    if "CHAOS_HEARTBEAT_S" in os.environ:  # a cut network: JAX itself must notice within the round
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", contract.local_devices)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            contract.coordinator_address,
            contract.process_count,
            contract.process_index,
            heartbeat_timeout_seconds=int(os.environ["CHAOS_HEARTBEAT_S"]),
        )
    else:
        contracts.initialize(contract)
    return train(root, story, clock, contract.process_index, args)


def _under_strace(inject: str) -> None:
    """Become the same program with failing system calls. -D: strace is the child, so that signals and ids are ours."""
    traced = ["strace", "-D", "-f", "-qqq", "-o", os.devnull, "-e", f"trace={inject.partition(':')[0]}"]
    os.execvp(
        "strace", [*traced, "-e", f"inject={inject}", sys.executable, "-m", "tests.proof.chaos.job", *sys.argv[1:]]
    )


def train(root: str, story: Story, clock: JumpingClock, index: int, args: dict[str, str]) -> int:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import orchestrator as oc
    from orchestrator.observe import events
    from orchestrator.rules.attempt_id import AttemptId

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    rows = 128 * max(1, int(args.get("kib", 64)) // 128)

    def value(step: int) -> np.ndarray:
        return np.random.default_rng(step).integers(0, 2**32, (rows, 256), dtype=np.uint32)

    def state(step: int) -> dict[str, Any]:
        whole = value(step)
        return {"w": jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at]), "count": step}

    def came(restored: oc.Restored | None) -> dict[str, Any]:
        return {"sources": dict(restored.sources)} if restored else {}

    def wrong(restored: oc.Restored) -> bool:
        whole, array = value(restored.step), restored.state["w"]
        same = all(np.array_equal(np.asarray(shard.data), whole[shard.index]) for shard in array.addressable_shards)
        mine = restored.process_states.get(index)
        ours = mine is None or mine == f"{index} at {restored.step}".encode()
        return not (same and ours and restored.state["count"] == restored.step)

    tiers = [oc.memory(every=int(args["hold"]), domain="rack")] if args.get("hold") else []

    def hear(event: events.Event) -> None:
        if isinstance(event, events.StepHeld | events.StepNotHeld | events.HeldStepDropped | events.CopyDropped):
            story.say(type(event).__name__, step=event.step, attempt=event.attempt)
        if isinstance(event, events.SaveCommitted) and tiers:
            story.say("saved", step=event.step, epoch=AttemptId(event.step, event.attempt).epoch)

    events.subscribe(hear)
    options = oc.Options(save_timeout_s=float(args.get("deadline", 10)), rendezvous_timeout_s=20, preemption_grace_s=15)
    save = oc.every(int(args.get("save", 1)))
    try:
        with oc.Agent(root, save=save, keep=oc.last(3), tiers=tiers, options=options) as agent:
            restored = agent.restore(like=jax.eval_shape(lambda: {"w": value(0), "count": 0}) | state(0))
            story.say(
                "opened", epoch=agent.epoch, restored=restored and restored.step, pid=os.getpid(), **came(restored)
            )
            if restored and wrong(restored):
                story.say("wrong", step=restored.step)
            for step in range(restored.step + 1 if restored else 0, int(args["steps"])):
                failures = agent.failures
                began = agent.save(step, state(step), process_state=f"{index} at {step}".encode())
                clock.jump()
                time.sleep(float(args.get("delay", 0.02)))
                leaving = agent.reached_preemption(step)
                started = time.monotonic()
                if not tiers:  # with them, uploads go on beside training
                    agent.wait_until_finished()
                if agent.failures > failures:
                    story.say("failed", step=step, seconds=time.monotonic() - started)
                elif began and not tiers:
                    story.say("saved", step=step, epoch=agent.epoch)
                if leaving:
                    story.say("preempted", step=step)
                    return contracts.EXIT_PREEMPTED
            story.say("done", failures=agent.failures)
    except oc.OrchestratorError as error:
        story.say("error", kind=type(error).__name__, text=str(error)[:500], exit_code=error.exit_code)
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    leave(main)

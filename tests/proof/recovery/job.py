"""The job that is killed: it trains on numbers from a data loader, and its state after each step can be computed.

python -m tests.proof.recovery.job ROOT STORY [key=value ...]      under a launcher (orchestrator/rules/contract.py)
    mib=M       size of the state, in 8 arrays        mesh=DxM     devices; then=DxM: after a restart
    hold=N      hold every N-th step in memory        save=N       save every N-th step to the store
    copies=N    on other hosts                        domain=L     the level of failure domains
    steps=N     train to step N                       delay=S      seconds per step
    check=after compare the bits after the first new step, not before it
    links=U,U   the store's URL for each host, where ROOT is in an emulated bucket
STORY is a file outside the run; each process appends one JSON object a line to STORY.<index>.

A step is w = w * A + c, modulo 2**32, where c is what the loader gives next. So w after step s tells that no step, and
no batch, was left out or trained twice. The loader's position is the state of its generator, which nothing but the
process state of the checkpoint brings back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from typing import Any

from launch import contract as contracts
from tests.proof.job_story import Story, leave

FACTOR, SEED = 1664525, 20261127
ARRAYS = 8
COLUMNS = 1024


def hear(story: Story, event: Any) -> None:
    """An event of the agent."""
    kind = type(event).__name__
    told = ("StepHeld", "SaveCommitted", "StepNotHeld", "SaveNotCommitted", "HeldStepDropped", "CopyDropped")
    if kind in told:
        story.say(kind, step=event.step, reason=getattr(event, "reason", "")[:500])
    elif kind == "StepRestored":
        story.say(kind, elapsed_s=event.elapsed_s, array_s=event.array_s, read_bytes=event.read_bytes)


class Loader:
    """Numbers. The position is the generator's state."""

    def __init__(self) -> None:
        import numpy as np

        self._random = np.random.Generator(np.random.PCG64(SEED))

    def next(self) -> int:
        return int(self._random.integers(2**32))

    def position(self) -> bytes:
        return json.dumps(self._random.bit_generator.state).encode()

    def restore(self, position: bytes) -> None:
        self._random.bit_generator.state = json.loads(position)


def after(step: int) -> tuple[int, int]:
    """(a, b): w after `step` is a * first + b, modulo 2**32."""
    loader, a, b = Loader(), 1, 0
    for _ in range(step + 1):
        a, b = a * FACTOR % 2**32, (b * FACTOR + loader.next()) % 2**32
    return a, b


def first(number: int, rows: int, at: Any) -> Any:
    """What array `number` begins with, of it the part `at`."""
    import numpy as np

    begin, end, _ = at[0].indices(rows)
    left, right, _ = at[1].indices(COLUMNS)
    row = np.arange(begin, end, dtype=np.uint32)[:, None] * np.uint32(2654435761 + number)
    return row ^ np.arange(left, right, dtype=np.uint32)[None, :]


class Training:
    """The state on the job's devices, and its step."""

    def __init__(self, args: dict[str, str], restarted: bool) -> None:
        import jax
        import jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        shape = tuple(map(int, args.get("then" if restarted else "mesh", f"{jax.device_count()}x1").split("x")))
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        self._sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
        self._rows = int(float(args.get("mib", 1)) * 2**20) // (ARRAYS * COLUMNS * 4) // 8 * 8
        form = jax.ShapeDtypeStruct((self._rows, COLUMNS), jnp.uint32, sharding=self._sharding)
        self.like = {f"w{number}": form for number in range(ARRAYS)}

        def step(state: Any, number: Any) -> Any:
            state = jax.tree.map(lambda leaf: leaf * jnp.uint32(FACTOR) + number, state)
            return state, sum(leaf[:, 0].sum() for leaf in state.values())  # all hosts take part in that

        self._step = jax.jit(step, donate_argnums=0)
        self._compiled: Any = None

    def begin(self) -> dict[str, Any]:
        import jax

        return {
            name: jax.make_array_from_callback(
                (self._rows, COLUMNS), self._sharding, lambda at, number=number: first(number, self._rows, at)
            )
            for number, name in enumerate(self.like)
        }

    def compile(self) -> None:
        import numpy as np

        self._compiled = self._step.lower(self.like, np.uint32(0)).compile()

    def step(self, state: Any, number: int) -> Any:
        import numpy as np

        state, total = self._compiled(state, np.uint32(number))
        total.block_until_ready()
        return state

    def is_right(self, state: Any, step: int) -> bool:
        """Whether each bit on this process's devices is the one that training to `step` leaves there."""
        import numpy as np

        a, b = after(step)
        return all(
            np.array_equal(np.asarray(shard.data), first(number, self._rows, shard.index) * np.uint32(a) + np.uint32(b))
            for number, leaf in enumerate(state.values())
            for shard in leaf.addressable_shards
        )


def main() -> int:
    root, path = sys.argv[1:3]
    args = dict(item.split("=", 1) for item in sys.argv[3:])
    contract = contracts.from_environment(os.environ)
    assert isinstance(contract, contracts.JobContract), "start this under a launcher"
    index = contract.process_index
    story = Story(path, index, contract.restart_count, durable=False, clock=time.time)
    story.say("started", pid=os.getpid())
    if args.get("links"):
        from launch.gcs_emulator.process import environ

        os.environ.update(environ(args["links"].split(",")[index]))
    contracts.initialize(contract)
    import jax

    import orchestrator as oc
    from orchestrator.observe.events import subscribe

    story.say("joined", devices=jax.device_count())
    subscribe(partial(hear, story))
    try:
        return train(root, story, args)
    except oc.OrchestratorError as error:
        story.say("error", kind=type(error).__name__, text=str(error)[:500])
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def tiers(args: dict[str, str]) -> list[Any]:
    import orchestrator as oc

    if not int(args.get("hold", 0)):
        return []
    keep, copies = int(args.get("keep", 2)), int(args.get("copies", 1))
    return [oc.memory(every=int(args["hold"]), copies=copies, domain=args.get("domain", "node"), keep=keep)]


def train(root: str, story: Story, args: dict[str, str]) -> int:
    import jax

    import orchestrator as oc

    training, loader = Training(args, story.restart > 0), Loader()
    last, check = int(args.get("steps", 10**6)), args.get("check", "before")
    options = oc.Options(rendezvous_timeout_s=60, save_timeout_s=120)
    with oc.Agent(
        root,
        save=oc.every(int(args.get("save", 1000))),
        keep=oc.last(int(args.get("last", 3))),
        tiers=tiers(args),
        options=options,
    ) as agent:
        story.say("opened")
        restored = agent.restore(like=training.like)
        if restored:
            loader.restore(next(iter(restored.process_states.values())))
            jax.block_until_ready(restored.state)
        begin = restored.step + 1 if restored else 0
        story.say("restored", step=begin - 1, sources=dict(restored.sources) if restored else {})
        state = restored.state if restored else training.begin()
        training.compile()
        story.say("compiled")
        if restored and check == "before":
            story.say("checked", step=begin - 1, right=training.is_right(state, begin - 1))
        for step in range(begin, last):
            state = training.step(state, loader.next())
            story.say("step", step=step)
            agent.save(step, state, process_state=loader.position())
            if step == begin and restored and check == "after":
                story.say("checked", step=step, right=training.is_right(state, step))
            if agent.reached_preemption(step):
                return contracts.EXIT_PREEMPTED
            time.sleep(float(args.get("delay", 0.1)))
        agent.wait_until_finished()
        story.say("done", step=last - 1, right=training.is_right(state, last - 1))
    return 0


if __name__ == "__main__":
    leave(main)

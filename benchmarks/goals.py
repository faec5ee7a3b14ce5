"""What a save and a restore cost training on one accelerator, each figure beside its goal and peers.

    python -m benchmarks.goals                          # 4 GiB in 64 arrays and 3000 leaves; about 4 minutes
    python -m benchmarks.goals --smoke                  # on CPU devices, small: only whether it runs

*Lost* is what training loses to a save: the time from the call until the save is durable, less what the steps that ran
meanwhile take when nothing else happens (their median before). The steps multiply matrices, donate the whole state, and
fetch their loss (`--no-fetch`: do not). Each section is a process of its own, and prints each figure as a line of JSON
as soon as it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # JAX's default, which `benchmarks.accelerator` changes

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import accelerator, jobs
from benchmarks.figures import say
from benchmarks.peers import OrbaxDefault, Ours
from benchmarks.worker import give_back, resident

STEP_S = 0.06  # about what a step takes
SECTIONS = ("lost", "first", "first-cold", "first-ring", "leaves", "leaves-cold", "restore")
LIMIT_S = 90  # of one section


class Staged(Ours):
    """Ours, with options."""

    def __init__(self, directory: Path, **options: Any) -> None:
        import orchestrator as oc

        self.agent = self._agent = oc.Agent(directory, options=oc.Options(on_save_failure="raise", **options))
        self._unsubscribe = lambda: None

    def save(self, state: Any, step: int = 1) -> None:
        self._agent.save(step, state)

    def is_done(self) -> bool:
        return self._agent.in_flight is None


class Managed(OrbaxDefault):
    def is_done(self) -> bool:
        return not self._manager.is_saving_in_progress()


class ManagedTuned(Managed):
    handler = accelerator.OrbaxTuned.handler


PEERS: dict[str, Callable[[Path], Any]] = {
    "ours": Staged,
    "ours, stage=host": lambda directory: Staged(directory, stage="host"),
    "ours, attest=save": lambda directory: Staged(directory, attest="save"),
    "Orbax tuned": ManagedTuned,
    "Orbax default": Managed,
}


class Training:
    """A state, and steps that donate it. usual_s: what a step takes undisturbed."""

    def __init__(self, state: dict[str, Any], args: argparse.Namespace) -> None:
        smoke: bool = args.smoke
        self.state, self._fetches, width = state, not args.no_fetch, 64 if smoke else 8192
        self._samples = 3 if smoke else 20
        self._weights = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
        self._times = 1
        took_s = min(self._products_s() for _ in range(4))
        self._times = max(1, int(STEP_S / took_s)) if not smoke else 2
        self.compile()
        self.usual_s = statistics.median(self.times())

    def times(self) -> list[float]:
        """Of steps that nothing disturbs, in order of length."""
        return sorted(self.step() for _ in range(self._samples))

    def _products_s(self) -> float:
        started = time.perf_counter()
        float(_products(self._weights, 10)[0, 0])
        return (time.perf_counter() - started) / 10

    def compile(self) -> None:
        """Again, as a program that has just started does."""
        self._compiled = jax.jit(functools.partial(_step, times=self._times), donate_argnums=(0, 1))
        self.step()
        self.step()

    def step(self) -> float:
        """Seconds until its result is there."""
        started = time.perf_counter()
        self.state, self._weights, loss = self._compiled(self.state, self._weights)
        if self._fetches:
            float(loss)
        else:
            loss.block_until_ready()
        return time.perf_counter() - started

    def lost_to(self, call: Callable[[], None], is_done: Callable[[], bool]) -> dict[str, Any]:
        """Milliseconds that training lost to `call` and what it begins, until `is_done`."""
        gc.collect()
        steps: list[float] = []
        started = time.perf_counter()
        call()
        blocked_s = time.perf_counter() - started
        while not steps or not is_done():
            steps.append(self.step())
        total_s = time.perf_counter() - started
        return {
            "lost": round(1000 * (total_s - len(steps) * self.usual_s), 1),
            "blocked": round(1000 * blocked_s, 1),
            "longest step": round(1000 * (max(steps) - self.usual_s), 1),
            "durable": round(1000 * total_s),
            "steps": len(steps),
            "slow": [
                [at, round(1000 * (s - self.usual_s), 1)] for at, s in enumerate(steps) if s > self.usual_s + 5e-4
            ],
        }


@functools.partial(jax.jit, static_argnums=1)
def _products(weights: Any, times: int) -> Any:
    """How many is no variable: a loop that asks would fetch the answer each time."""
    return jax.lax.fori_loop(0, times, lambda _, found: jnp.tanh(found @ found * 0.01), weights)


def _step(state: Any, weights: Any, *, times: int) -> Any:
    weights = _products(weights, times)
    return jax.tree.map(lambda leaf: leaf + 1, state), weights, weights[0, 0]


def target_of(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def few_large(args: argparse.Namespace) -> dict[str, Any]:
    return accelerator.build(args.bytes)


def many_small(args: argparse.Namespace) -> dict[str, Any]:
    """Half of 8 KiB, half scalars."""
    count, sharding = 10 if args.smoke else 1500, accelerator._sharding()
    hosts = {f"w{at:04d}": np.full((2, 1024), at, np.float32) for at in range(count)}
    return jax.device_put({**hosts, **{f"s{at:04d}": np.float32(at) for at in range(count)}}, sharding)


# The sections.


def lost(args: argparse.Namespace) -> None:
    """Rounds interleaved, after one that warms up."""
    training = Training(few_large(args), args)
    say("step", median=round(1000 * training.usual_s, 2), spread=_spread(training))
    for number in range(args.rounds + 1):
        for name, peer in PEERS.items():
            with fresh(args) as directory:
                saver = peer(directory / "run")
                found = training.lost_to(functools.partial(saver.save, training.state), saver.is_done)
                saver.wait()
                saver.close()
            if number or name == "ours":
                say("lost" if number else "lost, warming up", peer=name, **found)


def _spread(training: Training) -> list[float]:
    times = training.times()
    return [round(1000 * times[0], 2), round(1000 * times[-1], 2)]


def first(args: argparse.Namespace, told: bool = True, **options: Any) -> None:
    """A process's first saves. told: `restore(like=...)` has said what is going to be saved."""
    training = Training(few_large(args), args)
    give_back(0)
    size, before = sum(leaf.nbytes for leaf in training.state.values()), resident()
    with fresh(args) as directory:
        saver = Staged(directory / "run", **options)
        if told:  # and the training step is compiled next, which a model's takes longer than this one's
            started = time.perf_counter()
            assert saver.agent.restore(like=target_of(training.state)) is None
            training.compile()
            saver.agent._writer.close(20)
            took = round(1000 * (time.perf_counter() - started))
            say("ready to save, after the restore and compiling a step", ms=took, held=_held(before, size))
        for step in (1, 2, 3):
            found = training.lost_to(functools.partial(saver.save, training.state, step), saver.is_done)
            say(
                "first save" if step == 1 else "later save",
                told=told,
                **found,
                held=round((resident() - before) / size, 3),
            )
        saver.close()


def _held(before: int, size: int) -> float:
    """How much memory of the host has come since, in states."""
    return round((resident() - before) / size, 3)


def leaves(args: argparse.Namespace, told: bool = True) -> None:
    training = Training(many_small(args), args)
    target = target_of(training.state)
    with fresh(args) as directory:
        saver = Staged(directory / "run")
        if told:
            started = time.perf_counter()
            assert saver.agent.restore(like=target) is None
            saver.agent._writer.close(60)
            say("3000 leaves: ready to save", ms=round(1000 * (time.perf_counter() - started)))
        for step in range(1, 6):
            found = training.lost_to(functools.partial(saver.save, training.state, step), saver.is_done)
            say("3000 leaves", told=told, step=step, **found)
            if step == 1:
                saver.agent._writer.close(60)
        for _ in range(4):
            started = time.perf_counter()
            jax.block_until_ready(saver.restore(target))
            say("3000 leaves restored", ms=round(1000 * (time.perf_counter() - started)))
        saver.close()


def restore(args: argparse.Namespace) -> None:
    """Of a state that is in the page cache."""
    args.bytes = args.bytes * 3 // 4
    state = few_large(args)
    target = target_of(state)
    with fresh(args) as directory:
        peers: dict[str, Any] = {"ours": Staged, "Orbax tuned": ManagedTuned, "raw limit": accelerator.Raw}
        made = {name: peer(directory / name.replace(" ", "-")) for name, peer in peers.items()}
        for peer in made.values():
            peer.save(state)
            peer.wait()
        del state
        for number in range(args.rounds + 3):
            for name, peer in made.items():
                before, started = resident(), time.perf_counter()
                restored = jax.block_until_ready(peer.restore(target))
                took = time.perf_counter() - started
                grown = (resident() - before) / args.bytes
                del restored
                if number or name == "ours":
                    say(
                        "restore" if number else "first restore",
                        peer=name,
                        ms=round(1000 * took),
                        grown=round(grown, 3),
                    )
        for peer in made.values():
            peer.close()


@contextlib.contextmanager
def fresh(args: argparse.Namespace) -> Iterator[Path]:
    """A directory that is gone afterwards."""
    path = Path(tempfile.mkdtemp(prefix="bench-", dir=args.directory))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "lost": lost,
    "first": first,
    "first-cold": lambda args: first(args, told=False),
    "first-ring": lambda args: first(args, told=False, host_bytes_max=args.bytes // 8),
    "leaves": leaves,
    "leaves-cold": lambda args: leaves(args, told=False),
    "restore": restore,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="of the state of few arrays")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=jobs.directory, help="where to write")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--no-fetch", action="store_true", help="steps do not fetch their loss")
    parser.add_argument("--smoke", action="store_true", help="64 MiB and one round, on whatever device there is")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.bytes = 64 << 20 if args.smoke else int(args.gib * (1 << 30))
    args.rounds = 1 if args.smoke else args.rounds
    return args


def main() -> None:
    args = parse()
    if args.section:
        RUN[args.section](args)
        sys.stdout.flush()
        os._exit(0)
    for section in args.sections:
        started = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.goals", *sys.argv[1:], "--section", section],
                timeout=LIMIT_S,
                stderr=subprocess.PIPE,
                text=True,
            )
            complaint = done.stderr[-1500:] if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            complaint = f"more than {LIMIT_S} s: {(error.stderr or b'')[-1500:]!r}"
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({"section": section, "seconds": seconds, "failed": complaint}), flush=True)


if __name__ == "__main__":
    main()

"""Held steps, their copies and uploads, cut off after each effect on the disk: what the next start finds is no lie.

    python -m tests.proof.tier_crash            # every image; --most=60 for some of them

Two hosts hold steps with copies of each other's parts, save some, and come back once; strace has recorded every change
of the run and of both tiers. After each (and with each write torn) the job is taken up from what a crash has left, or a
power cut, by a new start that has one of the two hosts alone: the other one is lost with all that it held.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import orchestrator as oc
from orchestrator.errors import OrchestratorError
from orchestrator.run import tier_directory
from tests.proof.crash import Disk, Effect, lay_out, record
from tests.support.runs import store_of

JOB = Path(__file__).parents[1] / "support" / "jobs" / "tier_crash_job.py"
LIKE = {"w": jnp.zeros(512), "count": 0}
Image = dict[str, bytes | None]


@dataclass(frozen=True)
class Point:
    """What is left. held, saved: the newest step that had been called so; -1 if none."""

    where: str
    image: Image
    held: int
    saved: int


def trace(base: Path, deadline_s: float = 300) -> tuple[str, list[Effect]]:
    root = base / "both"
    root.mkdir()
    return str(root), record(JOB, root, base / "strace", deadline_s)


def points(traced: tuple[str, list[Effect]], *, power_cut: bool) -> Iterator[Point]:
    """Each different image once, from the first held step's beginning on."""
    root, effects = traced
    disk, told, seen = Disk(root), {"held": -1, "saved": -1}, set[object]()
    for number, effect in enumerate(effects):
        torn = effect.call == "write" and not power_cut and len(effect.data) > 1
        half = len(effect.data) // 2
        for part in (effect.data[:half], effect.data[half:]) if torn else (effect.data,):
            disk.apply(replace(effect, data=part))
            for line in effect.data.decode("latin-1").splitlines() if effect.call == "said" else ():
                word, _, step = line.partition(" ")
                if word in told:
                    told[word] = max(told[word], int(step))
            image = disk.image(power_cut=power_cut)
            key = frozenset((name, data and hashlib.sha256(data).digest()) for name, data in image.items())
            if (key, *told.values()) not in seen:
                seen.add((key, *told.values()))
                where = f"after {number} effects, {effect.call} {effect.path.removeprefix(root)}"
                yield Point(where, image, told["held"], told["saved"])


def broken(point: Point, host: int, base: Path, *, power_cut: bool) -> list[str]:
    """What is not as promised when the job goes on with this host alone."""
    lay_out(point.image, base)
    tier = base / f"host-{host}"
    tier.mkdir(exist_ok=True)
    for folder in [path for path in tier.rglob("*") if path.is_dir()]:
        folder.chmod(0o700)
    _move_tier(tier, base / "run")
    tiers = [oc.memory(every=1, keep=2, directory=tier)]
    options = oc.Options(async_save=False, on_save_failure="raise", events_dir="")
    problems = []
    with oc.Agent(base / "run", save=oc.every(3), tiers=tiers, options=options) as agent:
        newest = agent.latest_step()
        if (-1 if newest is None else newest) < point.saved:
            problems.append(f"step {point.saved} was called saved, the store's newest is {newest}")
        restored = agent.restore(LIKE)
        step = restored.step if restored else -1
        if step < max(point.saved, -1 if power_cut else point.held):
            problems.append(f"came back on {step}; held {point.held}, saved {point.saved} had been said")
        if restored and not np.array_equal(restored.state["w"], np.full(512, float(step))):
            problems.append(f"wrong values at step {step}")
        if restored and restored.process_states != {each: b"%d at %d" % (each, step) for each in (0, 1)}:
            problems.append(f"wrong process states at step {step}: {restored.process_states}")
        following = 9
        agent.save(following, {"w": jnp.full(512, 9.0), "count": following}, process_state=b"0 at 9")
        agent.wait_until_finished()
        if agent.latest_step() != following:
            problems.append("the next save was not committed")
    return problems


def _move_tier(tier: Path, run: Path) -> None:
    """Its directory is named by where the run lies, which is another place than where the trace was made."""
    with contextlib.suppress(OrchestratorError):
        if name := tier_directory.identity(store_of(run)):
            for found in tier.glob("orchestrator-*/*"):
                found.rename(found.with_name(name))


def explore(traced: tuple[str, list[Effect]], most: int = 0) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Kind of cut -> (different images, of which tried), and what was wrong."""
    counts, wrong = {}, []
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # what is durable is known from the trace
    for power_cut in (False, True):
        every = list(points(traced, power_cut=power_cut))
        chosen = random.Random(7).sample(every, min(most, len(every))) if most else every
        for number, point in enumerate(chosen):
            with tempfile.TemporaryDirectory(prefix="recovered-", dir=memory) as folder:
                problems = broken(point, number % 2, Path(folder) / "both", power_cut=power_cut)
            wrong += [f"{'power cut' if power_cut else 'crash'} {point.where}: {line}" for line in problems]
        counts["a power cut" if power_cut else "a crash"] = len(every), len(chosen)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=0, help="images of each kind; 0: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tier-crash-") as folder:
        started = time.monotonic()
        traced = trace(Path(folder))
        print(f"{len(traced[1])} effects recorded in {time.monotonic() - started:.0f} s", flush=True)
        counts, wrong = explore(traced, args.most)
    for kind, (images, tried) in counts.items():
        print(f"| {kind} | {len(traced[1])} | {images} | {tried} |")
    print(*wrong, f"{len(wrong)} wrong, {time.monotonic() - started:.0f} s", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What held steps are worth to a large job: its goodput with and without a memory tier, simulated.

    python -m benchmarks.goodput                        # prints the tables (half a minute)
    python -m benchmarks.goodput --write=docs/tiers.md  # writes them into the page
    python -m benchmarks.goodput --store_restore_s=120 --peers_restore_s=20 --start_s=60

Simulated: when hosts fail, at the rate that Llama 3's training has published; which losses the copies survive
(`rules/survival`); when saves and held steps begin and are safe; what is trained twice. Where the time goes is counted
by `rules/goodput`, as of a real run. Assumed, and to be given: how long saves, holds and each phase of a restart take.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from orchestrator.rules import goodput, survival
from orchestrator.rules.goodput import Incarnation, Mark

BEGIN, END = "<!-- goodput: begin -->", "<!-- goodput: end -->"
LLAMA_INTERRUPTIONS, LLAMA_DAYS, LLAMA_GPUS = 419, 54, 16_384  # unexpected ones: arXiv:2407.21783, section 3.3.4
DAY_S = 86_400.0
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Job:
    """A job, and how long its parts take. *_every_s: from the begin of one save (or held step) to that of the next;
    0: none. *_safe_s: until it is committed (or held). *_blocked_s: for which training stands still. detect_s: until a
    failure is known and hosts are there again; start_s: programs, JAX, compilation, whatever the source of the state.
    also_lost: the part of failures in which more is lost than the copies survive, besides what chance brings.
    rate: of failures, in those of Llama 3's chips."""

    hosts: int
    chips_per_host: int = 8
    save_every_s: float = 600.0
    save_safe_s: float = 300.0
    save_blocked_s: float = 1.0
    hold_every_s: float = 0.0
    hold_safe_s: float = 20.0
    hold_blocked_s: float = 0.5
    detect_s: float = 60.0
    start_s: float = 120.0
    store_restore_s: float = 600.0
    peers_restore_s: float = 60.0
    also_lost: float = 0.02
    rate: float = 1.0
    days: float = LLAMA_DAYS

    @property
    def failures_per_s(self) -> float:
        chips = self.hosts * self.chips_per_host
        return self.rate * LLAMA_INTERRUPTIONS * chips / LLAMA_GPUS / (LLAMA_DAYS * DAY_S)


class _Training:
    """What a job has trained and what of it is safe, in seconds of training."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job, self.chance = job, random.Random(seed)
        self.saved = self.held = 0.0
        self.lost: set[int] = set()  # hosts, since the newest held step
        self.targets = [((host + job.hosts // 2) % job.hosts,) for host in range(job.hosts)]

    def comes_back_on(self) -> tuple[float, float]:
        """Where it begins again after a host is lost, and how long the state takes to come."""
        lost, more = self.chance.randrange(self.job.hosts), self.chance.random() < self.job.also_lost
        self.lost.add(lost)
        if self.held and (more or not survival.survives(self.targets, self.lost)):
            self.held = 0.0
        if self.held > self.saved:
            return self.held, self.job.peers_restore_s
        return self.saved, self.job.store_restore_s

    def train(self, began: float, at: float, until: float) -> tuple[float, list[tuple[float, float]]]:
        """From wall time `began` with `at` trained. Returns what is trained in the end, and when it stood still."""
        job = self.job
        blocked: list[tuple[float, float]] = []
        saves, holds = job.save_every_s or float("inf"), job.hold_every_s or float("inf")
        next_save, next_hold, now = began + saves, began + holds, began
        while (turn := min(next_save, next_hold)) < until:
            at, now = at + max(0.0, turn - now), max(now, turn)
            if next_save <= next_hold:
                next_save, safe_s, stands_s = next_save + saves, job.save_safe_s, job.save_blocked_s
                if now + safe_s < until:
                    self.saved = at
            else:
                next_hold, safe_s, stands_s = next_hold + holds, job.hold_safe_s, job.hold_blocked_s
                if now + safe_s < until:
                    self.held, self.lost = at, set()
            blocked.append((now, min(now + stands_s, until)))
            now = min(now + stands_s, until)
        return at + max(0.0, until - now), blocked


def simulate(job: Job, seed: int) -> dict[goodput.Kind, float]:
    """Seconds of each kind."""
    training = _Training(job, seed)
    ends, now, epoch = job.days * DAY_S, 0.0, 0
    at, restore_s = 0.0, 0.0
    found: list[Incarnation] = []
    while now < ends:
        epoch += 1
        fails = min(now + training.chance.expovariate(job.failures_per_s), ends)
        begins = now + job.start_s + restore_s
        marks: list[Mark] = []
        blocked: list[tuple[float, float]] = []
        if begins < fails:
            reached, blocked = training.train(begins, at, fails)
            marks = [Mark(begins, int(at), judged=False), Mark(fails, int(reached), judged=False)]
        found.append(Incarnation(epoch, now, fails, fails == ends, marks, blocked))
        at, restore_s = training.comes_back_on()
        now = fails + job.detect_s
    return goodput.seconds(goodput.split(found))


def share(job: Job, seeds: Sequence[int] = SEEDS) -> float:
    """Of the time, in which something new was trained: per cent, over some seeds."""
    shares = []
    for seed in seeds:
        seconds = simulate(job, seed)
        shares.append(100 * seconds["training"] / sum(seconds.values()))
    return statistics.fmean(shares)


HOLD_EVERY_S = 100.0  # 20 steps of 5 s
JOBS = (Job(1000), Job(2048), Job(8750, 4), Job(30_000, 4), Job(30_000))


def row(job: Job) -> str:
    per_day = job.failures_per_s * DAY_S
    without, with_it = (
        share(replace(job, hold_every_s=0.0)),
        share(replace(job, hold_every_s=job.hold_every_s or HOLD_EVERY_S)),
    )
    more = f"+{with_it - without:.1f} | x {with_it / without:.2f}"
    size = f"{job.hosts:,} | {job.hosts * job.chips_per_host:,} | {per_day:.1f}"
    return f"| {size} | {without:.1f} % | {with_it:.1f} % | {more} |"


SAVES_S, RESTORES_S, RATES = (1800.0, 600.0, 300.0), (600.0, 120.0), (1, 4)


def sensitivity(job: Job) -> list[str]:
    """Points of goodput that held steps bring to a job, by what it would be without them."""
    lines = []
    for save_s in SAVES_S:
        cells = []
        for slower in RATES:
            for restore_s in RESTORES_S:
                one = replace(job, save_every_s=save_s, store_restore_s=restore_s, rate=job.rate / slower)
                without = share(replace(one, hold_every_s=0.0), SEEDS[:1])
                with_it = share(replace(one, hold_every_s=one.hold_every_s or HOLD_EVERY_S), SEEDS[:1])
                cells.append(f"{without:.1f} % +{with_it - without:.1f}")
        lines.append(f"| {save_s / 60:g} min | {' | '.join(cells)} |")
    return lines


def tables(given: dict[str, float]) -> str:
    changed: dict[str, Any] = {**given}
    jobs = [replace(job, **changed) for job in JOBS]
    heads = [f"{'a quarter of them, ' * (slower > 1)}{each / 60:g} min" for slower in RATES for each in RESTORES_S]
    parts = [
        "| hosts | chips | failures a day | store alone | with held steps | points | steps trained |",
        "|---|---|---|---|---|---|---|",
        *map(row, jobs),
        "",
        f"| {jobs[2].hosts * jobs[2].chips_per_host:,} chips, a save every | restore from the store in "
        f"{' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
        *sensitivity(jobs[2]),
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page that has the marks")
    names = [field.name for field in fields(Job) if field.name not in ("hosts", "chips_per_host")]
    for name in names:
        parser.add_argument(f"--{name}", type=float, help=f"default: {getattr(Job(1), name):g}")
    args = parser.parse_args()
    text = tables({name: getattr(args, name) for name in names if getattr(args, name) is not None})
    print(text)
    if args.write:
        page = args.write.read_text()
        args.write.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{page.split(END)[1]}")


if __name__ == "__main__":
    main()

"""Damage in the tiers of two hosts and in the copies between them: what comes back is what was saved, from wherever.

    python -m tests.proof.tier_damage --rounds=500 --seed=7           # prints the table
    python -m tests.proof.tier_damage --rounds=500 --write=docs/tiers.md

Each host has its own part of a held step and a copy of the other's. In each round a file, or both copies of one, is
flipped, cut short, swapped with another file of the step, or replaced by the file of this name of an older step or of
another start of the job. Then both restore, reading from their own directories and from each other by real tier
servers. What comes back is compared bit for bit; every file that was wrong where somebody read it must have been named.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.observe import events
from tests.support.runs import LIKE, state
from tests.support.tiers import SomeHosts, Together, agent, crash, crashed_at_14, held_dir

BEGIN, END = "<!-- damage: begin -->", "<!-- damage: end -->"
SEED = 7
NEWEST, OLDER = 14, 12
OTHER = 100  # what another start's states differ by
KINDS = ("flipped", "cut short", "swapped", "of an older step", "of another start")
NAMED, STEPPED_DOWN, UNREAD = "read from another source, and named", "older step taken, and named", "not read"
_HEX = re.compile(r"[0-9a-f]{32}")
_ATTEMPT = re.compile(r"steps/[0-9]{8}/[^/]+/")


class Silent(Exception):
    """What came back is not what was saved, or nobody was told."""


def role(name: str) -> str:
    """What a file is to its attempt, whatever its random name."""
    return _HEX.sub("*", _ATTEMPT.sub("", name))


def is_data(name: str) -> bool:
    return "/state/ocdbt.process_" in name


@dataclass
class Campaign:
    """Two hosts, and where wrong bytes come from. older, other: by role, the files of the older step, and of this step
    as another start of the job has held it."""

    hosts: SomeHosts
    older: dict[str, bytes]
    other: dict[str, bytes]
    chance: random.Random

    def refill(self) -> None:
        hosts = self.hosts
        for host in range(2):
            shutil.rmtree(hosts.tier(host))
            hosts.tier(host).mkdir()
        hosts.place(0, 0, lambda name: not is_data(name))
        hosts.place(1, 1, lambda name: is_data(name) or name.startswith("journal"))
        hosts.place(1, 0, lambda name: name.startswith("steps/") and not is_data(name))
        hosts.place(0, 1, is_data)

    def body(self, kind: str, name: str) -> bytes:
        """Other bytes than the file's."""
        right = self.hosts.files[name]
        at = self.chance.randrange(len(right))
        match kind:
            case "flipped":
                return right[:at] + bytes([right[at] ^ 1 << self.chance.randrange(8)]) + right[at + 1 :]
            case "cut short":
                return right[:at]
            case "swapped":
                others = [body for one, body in self.hosts.files.items() if one.startswith(f"steps/{NEWEST:08d}/")]
                return self.chance.choice([body for body in others if body != right])
        return (self.older if kind == "of an older step" else self.other)[role(name)]

    def spoil(self) -> tuple[str, str, int]:
        """Which kind of damage, in which file, on how many hosts."""
        kind = self.chance.choice(KINDS)
        names = [name for name in self.hosts.files if name.startswith(f"steps/{NEWEST:08d}/")]
        name = self.chance.choice(names)
        both = self.chance.random() < 0.3
        for host in (0, 1) if both else (self.chance.randrange(2),):
            self.hosts.place(host, int(is_data(name)), lambda one: one == name, self.body(kind, name))
        return kind, name.split("/", 3)[3], 2 if both else 1


@contextmanager
def told() -> Iterator[list[Any]]:
    found: list[Any] = []
    kinds = (events.CopyDropped, events.HeldStepDropped)
    stop = events.subscribe(lambda event: found.append(event) if isinstance(event, kinds) else None)
    try:
        yield found
    finally:
        stop()


def judged(restored: list[Any], seen: list[Any], what: tuple[str, str, int]) -> str:
    """What has become of a round. Raises Silent."""
    (step,) = {one.step for one in restored}
    for one in restored:
        right = state(step)
        if not np.array_equal(one.state["w"], right["w"]) or one.state["count"] != step:
            raise Silent(f"{what}: step {step} came back with other arrays")
        if one.process_states != {0: f"at {step}".encode()} or one.extra["at"] != step:
            raise Silent(f"{what}: step {step} came back with other records")
    dropped = [event.file for event in seen if isinstance(event, events.CopyDropped)]
    down = [event.step for event in seen if isinstance(event, events.HeldStepDropped)]
    if step == NEWEST:
        if set(dropped) - {what[1]}:
            raise Silent(f"{what}: {dropped} were dropped")
        return NAMED if dropped else UNREAD
    if step != OLDER or set(down) != {NEWEST} or what[2] != 2:
        raise Silent(f"{what}: step {step} came back, dropped {down}")
    return STEPPED_DOWN


def read_by_a_restore(name: str) -> bool:
    """Whether a wrong byte in a file is always noticed. Receipts and Orbax's own files are not read; in a data file,
    what follows a chunk is not where that is read whole."""
    return name in ("manifest.json", "intent.json", "extra.json", "state/manifest.ocdbt") or name.startswith(
        ("process/", "state/d/")
    )


def run(rounds: int, seed: int, folder: Path) -> Counter[tuple[str, str]]:
    chance = random.Random(seed)
    campaign = prepared(folder, chance)
    came: Counter[tuple[str, str]] = Counter()
    with campaign.hosts.servers(Together(2)) as job:
        for _ in range(rounds):
            campaign.refill()
            what = campaign.spoil()
            with told() as seen:
                restored = campaign.hosts.restore_with(job)
            outcome = judged(restored, seen, what)
            if outcome == UNREAD and read_by_a_restore(what[1]):
                raise Silent(f"{what}: nobody has noticed")
            came[what[0], outcome] += 1
    return came


def prepared(folder: Path, chance: random.Random) -> Campaign:
    root, kept = folder / "job/run", folder / "kept"
    root.parent.mkdir()
    crashed_at_14(root)
    shutil.copytree(root.parent, kept)
    running = agent(root)  # another start: it goes on from step 12, and its step 14 is another one
    shutil.rmtree(next(held_dir(root).glob(f"steps/{NEWEST:08d}")))
    assert running.restore(LIKE)
    running.save(NEWEST, state(NEWEST + OTHER), process_state=b"another", extra={"at": NEWEST + OTHER})
    running._holding.settle()
    crash(running)

    def by_role(tier: Path, step: int) -> dict[str, bytes]:
        paths = [path for path in (tier / f"steps/{step:08d}").rglob("*") if path.is_file()]
        return {role(str(path.relative_to(tier))): path.read_bytes() for path in paths}

    of_other = by_role(held_dir(root), NEWEST)
    shutil.rmtree(root.parent)
    kept.rename(root.parent)
    of_older = by_role(held_dir(root), OLDER)
    return Campaign(SomeHosts(root, folder / "hosts", 2), of_older, of_other, chance)


def table(came: Counter[tuple[str, str]]) -> str:
    outcomes = (NAMED, STEPPED_DOWN, UNREAD)
    lines = ["| wrong bytes | rounds | " + " | ".join(outcomes) + " | silent |", "|---|---|" + "---|" * 4]
    row: Callable[[str, list[int]], str] = lambda kind, counts: (  # noqa: E731
        f"| {kind} | {sum(counts)} | " + " | ".join(map(str, counts)) + " | 0 |"
    )
    lines += [row(kind, [came[kind, one] for one in outcomes]) for kind in KINDS]
    return "\n".join([*lines, row("all", [sum(came[kind, one] for kind in KINDS) for one in outcomes])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--write", type=Path, help="the page that has the marks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            came = run(args.rounds, args.seed, Path(folder))
        except Silent as error:
            print(f"silent: {error}", file=sys.stderr)
            return 1
    text = f"{table(came)}\n\n`python -m tests.proof.tier_damage --rounds={args.rounds} --seed={args.seed}`"
    print(text)
    if args.write:
        page = args.write.read_text()
        args.write.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{page.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

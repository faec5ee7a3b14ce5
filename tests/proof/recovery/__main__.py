"""Loses hosts of a job that trains, again and again, and checks what it comes back to.

    python -m tests.proof.recovery --rounds=100 --outside=20 --seed=1 --out=recovery.jsonl
    python -m tests.proof.recovery --rounds=100 --only=7     # one round again
    python -m tests.proof.recovery --out=recovery.jsonl --write=docs/tiers.md --rounds=0 --outside=0

One job of four simulated hosts under the launcher for each setting; what is killed and when follows from seed and
round. Within the promise the job must come back to the newest step that all survivors were told is held, without a byte
of array data from the store; outside of it, to the newest committed step; the bits are checked on every device. Ends
with 1 if anything was not so.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.lines import keep, read
from tests.proof.chaos.arena import Hang
from tests.proof.recovery import report
from tests.proof.recovery.rounds import HOSTS, Round, Setting, judge, outside, within
from tests.proof.recovery.scene import Scene

START_S, BACK_S = 120.0, 120.0
JOB = ("mib=1", "delay=0.1")


def main() -> int:
    args = parse()
    done = {(line["within"], line["round"]) for line in read(args.out)} if args.out else set()
    plan = [one for one in planned(args) if (one.within, one.number) not in done]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left running
    with tempfile.TemporaryDirectory(prefix="recovery-") as scratch:
        made = ({"seed": args.seed, **line} for line in play_all(plan, Path(scratch), args.settle))
        found = report.newest(keep(made, args.out, report.told))
    if args.out:
        table = report.table(found)
        print(table)
        if args.write:
            report.write(args.write, "recovery", table)
    return 1 if any(line["problems"] for line in found) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="leave out the rounds before this one")
    parser.add_argument("--outside", type=int, default=20, help="rounds outside the promise, after the others")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="this round of --rounds alone")
    parser.add_argument("--out", type=Path, help="a JSON line for each round; rounds that are in it are not run again")
    parser.add_argument("--write", type=Path, help="a page of the docs whose table to renew from --out")
    parser.add_argument("--settle", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def planned(args: argparse.Namespace) -> list[Round]:
    if args.only is not None:
        return [within(args.seed, args.only, args.rounds)]
    inside = [within(args.seed, number, args.rounds) for number in range(args.first, args.rounds)]
    return inside + [outside(args.seed, number) for number in range(args.outside)]


def play_all(plan: list[Round], scratch: Path, settle_s: float) -> Iterator[dict[str, Any]]:
    """A setting's rounds are all of one job; after a round in which it hung, of a new one."""
    scene, setting, jobs = None, None, 0
    try:
        for one in plan:
            if scene is None or setting is not one.setting:
                if scene is not None:
                    scene.end()
                jobs, setting = jobs + 1, one.setting
                scene = start(scratch / f"job-{jobs}", setting)
            try:
                line = play(scene, one)
            except Hang as error:
                line = {"problems": [f"hangs: {error}"]}
                scene.end()
                scene = None
            yield {**described(one), **line}
            time.sleep(settle_s)
    finally:
        if scene is not None and (left := scene.end()):
            print(f"left over: processes {left}", file=sys.stderr)


def start(base: Path, setting: Setting) -> Scene:
    scene = Scene(base, str(base / "run"), HOSTS, setting.flags, (*JOB, *setting.args))
    scene.until("the first start is held", lambda: scene.all_said("StepHeld"), START_S)
    return scene


def described(one: Round) -> dict[str, Any]:
    return {
        "within": one.within,
        "round": one.number,
        "setting": one.setting.name,
        "kind": one.kind,
        "lost": one.lost,
        "crashed": one.crashed,
        "moment_s": round(one.moment_s, 3),
        "again_s": one.again_s and round(one.again_s, 3),
    }


def play(scene: Scene, one: Round) -> dict[str, Any]:
    """Raises Hang."""
    wanted = "StepHeld" if one.within else "SaveCommitted"
    killed = scene.until(f"a step of this start: {wanted}", lambda: promised(scene, one.within), BACK_S)
    time.sleep(one.moment_s)
    killed_s = scene.end_processes(one.lost, signal.SIGKILL)
    scene.end_processes(one.crashed, signal.SIGSEGV)
    after = killed
    if one.again_s is not None:
        time.sleep(one.again_s)
        after = max(killed, scene.restart)
        scene.end_processes(one.lost, signal.SIGKILL)
    back = scene.until("trains again", lambda: scene.all_said("step", after), BACK_S)
    scene.until("checked", lambda: scene.all_said("checked", back - 1), BACK_S)
    verdict = judge(one, scene.poll(), killed, back, killed_s)
    found = {name: value for name, value in vars(verdict).items() if name != "seconds"}
    return {**found, "seconds": round(verdict.seconds, 2), "restarts": back - killed}


def promised(scene: Scene, inside: bool) -> int | None:
    """The newest start, if a step of its own is held by all; outside, one must be committed, too."""
    restart = scene.restart
    held = len(scene.said("StepHeld", restart)) >= HOSTS
    committed = inside or any(line["event"] == "SaveCommitted" for line in scene.lines)
    return restart if held and committed else None


if __name__ == "__main__":
    sys.exit(main())

"""One host of four is lost with its memory: seconds until the job trains again, from memory and from the store.

    python -m tests.proof.recovery.restarts --mib 256 1024 --rounds=3
    python -m tests.proof.recovery.restarts --mib 256 --rounds=3 --fewer        # on 2 hosts instead, with another mesh
    python -m tests.proof.recovery.restarts --out=restarts.jsonl --rounds=0     # the table of what was measured before

The store is the repository's emulator, of which each host has a link of its own: 50 MB/s and 30 ms a request, or as
fast as it goes. It counts what goes over each link: a restart from memory has read 0 bytes of arrays there. A line of
JSON for each restart, rounds interleaved.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import statistics
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from benchmarks.lines import Line, keep
from launch.gcs_emulator.process import EmulatorProcess
from tests.proof.recovery import report
from tests.proof.recovery.scene import Scene

HOSTS, LOST, BUCKET = 4, 2, "recovery"
SPEEDS = {"50 MB/s, 30 ms": {"bytes_per_s": 50e6, "latency_s": 0.03}, "unthrottled": {"bytes_per_s": 0.0}}
WAYS = {"memory": ("hold=4", "copies=1", "save=100000", "keep=1"), "store": ("save=4", "last=1")}
PHASES = ("detect", "end the others", "start", "open", "agree", "fetch and place", "compile", "first step")
LIMIT_S = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, nargs="*", default=[256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--speeds", nargs="*", choices=list(SPEEDS), default=list(SPEEDS))
    parser.add_argument("--fewer", action="store_true", help="come back on 2 hosts, with another mesh")
    parser.add_argument("--out", type=Path, help="append each line to it, and print the table of all that are in it")
    parser.add_argument("--write", type=Path, help="a page of the docs whose table to renew")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left running
    found = keep(measured(args), args.out)
    print(table(found))
    if args.write:
        report.write(args.write, "restarts", table(found))
    return 1 if any(line["problems"] for line in found) else 0


def measured(args: argparse.Namespace) -> Iterator[Line]:
    for number, mib, speed, way in itertools.product(range(args.rounds), args.mib, args.speeds, args.ways):
        with tempfile.TemporaryDirectory(prefix="restart-") as scratch:
            line = {"round": number, **measure(Path(scratch), mib, speed, way, args.fewer)}
        yield line


def measure(base: Path, mib: int, speed: str, way: str, fewer: bool) -> Line:
    with EmulatorProcess([BUCKET], f"--links={HOSTS}", "--max_gib=12") as store:
        links = ",".join(link["url"] for link in store.links(**SPEEDS[speed]))
        flags = ["--lose_tier_on_kill", "--devices_per_process=2"] if way == "memory" else ["--devices_per_process=2"]
        more = ["--processes_after_restart=2"] if fewer else []
        then = ["mesh=8x1", "then=2x2" if fewer else "then=8x1"]
        job = [f"mib={mib}", f"links={links}", "check=after", "delay=0.2", *then, *WAYS[way]]
        scene = Scene(base / "job", f"gs://{BUCKET}/run", HOSTS, [*flags, *more], job)
        try:
            return {"mib": mib, "store": speed, "way": way, "hosts": 2 if fewer else HOSTS, **_kill(scene, store, way)}
        finally:
            scene.end()


def _kill(scene: Scene, store: EmulatorProcess, way: str) -> Line:
    """Raises Hang."""
    event = "StepHeld" if way == "memory" else "SaveCommitted"
    expected = scene.until(f"all were told of a {event}", lambda: newest(scene, event), LIMIT_S)
    store.counts(reset=True)
    killed_s = scene.end_processes([LOST], signal.SIGKILL)
    scene.hosts = 2 if any(flag.startswith("--processes_after") for flag in scene.flags) else HOSTS
    scene.until("trains again", lambda: scene.all_said("step", 0), LIMIT_S)
    links = store.links()
    scene.until("compared", lambda: scene.all_said("checked", 0), LIMIT_S)
    expected = max(expected, newest(scene, event) or 0)  # told of before they died
    restored = {line["step"] for line in scene.said("restored", 1).values()}
    arrays = [sum(size for name, size in link["sent"].items() if "/state/" in name) for link in links]
    right = [line["right"] for line in scene.said("checked", 1).values()]
    return {
        "restored": sorted(restored),
        "sources": [line["sources"] for _, line in sorted(scene.said("restored", 1).items())],
        "array bytes from the store": arrays,
        "requests": [sum(link["requests"].values()) for link in links],
        "phases": phases(scene, killed_s),
        "problems": judge(expected, restored, right, arrays, way),
    }


def judge(
    expected: int, restored: Collection[int], right: Sequence[bool], arrays: Sequence[int], way: str
) -> list[str]:
    """What is wrong with a restart. right: of each process, its bits. arrays: bytes of them over each host's link."""
    problems = []
    if min(restored) < expected or len(restored) > 1:
        problems.append(f"restored {sorted(restored)}, expected step {expected}")
    if not all(right):
        problems.append("wrong bits")
    if way == "memory" and sum(arrays):
        problems.append(f"{arrays} bytes of arrays from the store")
    return problems


def newest(scene: Scene, event: str) -> int | None:
    """The newest step, after the first, that all were told of in the first start."""
    told: list[set[int]] = [set() for _ in range(HOSTS)]
    for line in scene.poll():
        if line["event"] == event and line["restart"] == 0 and line["step"]:
            told[line["process"]].add(line["step"])
    return max(set.intersection(*told), default=None)


def phases(scene: Scene, killed_s: float) -> dict[str, float]:
    """Seconds of each, of the last process; `total` is from the kill to its first new step."""
    exits = [line["time"] for line in scene.timeline() if line["event"] == "exit" and line["restart"] == 0]
    said = {
        event: max(line["time"] for line in scene.said(event, 1).values())
        for event in ("joined", "opened", "restored", "compiled", "step")
    }
    array_s = max(line["array_s"] for line in scene.said("StepRestored", 1).values())
    times = [killed_s, min(exits), max(exits), said["joined"], said["opened"], said["restored"] - array_s]
    times += [said["restored"], said["compiled"], said["step"]]
    found = {name: round(end - begin, 2) for name, (begin, end) in zip(PHASES, itertools.pairwise(times), strict=True)}
    return {**found, "total": round(said["step"] - killed_s, 2)}


def table(lines: Sequence[Line]) -> str:
    """Medians."""
    made = [
        "| state | store | hosts after | from | "
        + " | ".join([*PHASES, "**total**", "array bytes from the store"])
        + " |"
    ]
    made.append("|---|---|---|---|" + "---|" * (len(PHASES) + 2))
    for key in dict.fromkeys((line["mib"], line["store"], line["hosts"], line["way"]) for line in lines):
        mine = [line for line in lines if (line["mib"], line["store"], line["hosts"], line["way"]) == key]
        medians = [statistics.median(line["phases"][name] for line in mine) for name in (*PHASES, "total")]
        sent = max(sum(line["array bytes from the store"]) for line in mine)
        cells = [f"{key[0]} MiB", key[1], str(key[2]), f"{key[3]} ({len(mine)})", *(f"{one:.1f} s" for one in medians)]
        made.append("| " + " | ".join([*cells, f"{sent:,}"]) + " |")
    return "\n".join(made) + "\n"


if __name__ == "__main__":
    sys.exit(main())

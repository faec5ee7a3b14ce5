"""Rehearses incidents on real jobs, and checks what `watch`, `doctor`, the alerts and `report` say of each.

    python -m tests.proof.incidents [--only=frozen] [--write=docs/failure-modes.md] [--keep=FOLDER]

All incidents at once, each on a job of two hosts, under one Prometheus with the rules of docs/ops: about ten minutes.
Linux, root (for a small file system that can be full), prometheus and promtool. Ends with 1 where a tool did not say
the truth.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.proof.incidents.cases import CASES, DISK_MIB, Case
from tests.proof.incidents.monitoring import Files, Prometheus
from tests.proof.incidents.scene import GuardedBucket, Look, Scene, new_ports

BEGIN, END = "<!-- incidents: begin -->", "<!-- incidents: end -->"
START_S = 240.0
WARM_S = 60.0  # of scrapes before the strike
LAST_S = 480.0  # after it
COMMITS = 3
_SHOWN = 230  # characters of what a tool says


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="incidents whose name contains one of these, separated by commas")
    parser.add_argument("--write", type=Path, help="a page whose table's rows are made again")
    parser.add_argument("--keep", type=Path, help="where everything stays; else a temporary folder")
    parser.add_argument("--seconds", type=float, default=LAST_S, help="how long alerts are waited for")
    args = parser.parse_args()
    if not shutil.which("prometheus"):
        print("skipped: prometheus is not installed")
        return 0
    chosen = [case for case in CASES if any(part in case.name for part in args.only.split(","))]
    with contextlib.ExitStack() as stack:
        base = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="incidents-")))
        scenes = {case: stack.enter_context(staged(case, base)) for case in chosen}
        files = stack.enter_context(contextlib.closing(Files(base / "metrics")))
        (base / "metrics").mkdir(parents=True)
        for case, scene in scenes.items():
            (base / "metrics" / slug(case)).symlink_to(scene.folder)
        jobs = {slug(case): scene.ports for case, scene in scenes.items()}
        prometheus = stack.enter_context(contextlib.closing(Prometheus(base / "prometheus", jobs, files)))
        play(scenes, prometheus, args.seconds)
        rows, wrong = judge(scenes, prometheus)
        if len(chosen) == len(CASES):
            wrong += [f"the dashboard shows nothing in: {panel}" for panel in prometheus.silent_panels()]
    print(*rows, *wrong, sep="\n")
    if args.write:
        put(args.write, rows)
    return int(bool(wrong))


def put(page: Path, rows: list[str]) -> None:
    """The rows of incidents that were rehearsed in the place of those that were there; others stay."""
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    known = {row.partition(":")[0]: row for row in (*table.strip().splitlines(), *rows)}
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(known.values()) + f"\n\n{END}{after}")


def slug(case: Case) -> str:
    return case.name.replace(" ", "_")


@contextlib.contextmanager
def staged(case: Case, base: Path) -> Iterator[Scene]:
    """A scene, whose processes are ended and whose file system is taken away afterwards."""
    home = base / slug(case)
    disk = home / "disk"
    disk.mkdir(parents=True)
    bucket = None
    mounted = False
    try:
        if case.place == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "incidents", str(disk)]
            subprocess.run(command, check=True, timeout=30)
            mounted = True
        if case.place == "bucket":
            bucket = GuardedBucket(home / "keys")
            os.environ.update(bucket.people)  # of this process, and of the commands that it runs
        scene = Scene(home, "gs://rehearsal/run" if bucket else str(disk / "run"), new_ports(), bucket)
        scene.start(case.flags, case.args)
        time.sleep(3)  # two cores, and each start takes some
        yield scene
        scene.arena.end()
    finally:
        if "scene" in locals():
            scene.arena.end()
        if bucket:
            bucket.close()
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True, timeout=30)


def play(scenes: dict[Case, Scene], prometheus: Prometheus, last_s: float) -> None:
    """Start, strike, and look once a second until the end."""
    waiting = dict(scenes)
    give_up = time.monotonic() + START_S
    while waiting:
        for case, scene in list(waiting.items()):
            now = scene.look()
            if now and len(now.commits) >= COMMITS:
                del waiting[case]
        if waiting and time.monotonic() > give_up:
            stories = {case.name: scene.arena.tail() for case, scene in waiting.items()}
            raise SystemExit(f"not started within {START_S:g} s: {stories}")
        time.sleep(0.5)
    time.sleep(WARM_S)
    end = time.monotonic() + last_s
    with ThreadPoolExecutor(len(scenes)) as pool:  # each by its own watch: no tool waits for another incident's
        played = [pool.submit(play_one, case, scene, end) for case, scene in scenes.items()]
        print(f"struck: {len(scenes)} incidents", flush=True)
        while time.monotonic() < end:
            prometheus.look()
            time.sleep(1)
        for each in played:
            each.result()


def play_one(case: Case, scene: Scene, end: float) -> None:
    scene.struck = time.monotonic()
    case.strike(scene)
    while time.monotonic() < end:
        look(case, scene)
        time.sleep(1)


def look(case: Case, scene: Scene) -> None:
    now = scene.look()
    if now is None:
        text = "(no run)"
    else:
        text = f"{now.verdict}  {now.why}"
        if scene.first is None and re.search(case.watch, shown := f"{text}\n{scene.page(now)}"):
            scene.first = scene.since()
            scene.said["watch"] = shown
    if not scene.verdicts or scene.verdicts[-1].text.split("  ")[0] != text.split("  ")[0]:
        scene.verdicts.append(Look(scene.since(), text))
    if "doctor" not in scene.said and scene.since() > case.look_s:
        scene.said["doctor"] = scene.ask("doctor")
        scene.said["report"] = scene.report()


def judge(scenes: dict[Case, Scene], prometheus: Prometheus) -> tuple[list[str], list[str]]:
    """(the table's lines, what was not the truth)."""
    rows = ["| incident | `watch` | `doctor` | alert | `report` |", "|---|---|---|---|---|"]
    wrong: list[str] = []
    for case, scene in scenes.items():
        fired = {
            f"{way} {alert}": at - scene.struck
            for (job, alert), at in sorted(prometheus.firing.items())
            for suffix, way in (("", "endpoint"), ("-file", "file"))
            if job == slug(case) + suffix
        }
        missing = {each for each in both_ways(case.alerts) if each not in fired}
        wrong += [f"{case.name}: did not fire: {each}" for each in sorted(missing)]
        wrong += [f"{case.name}: fired: {each}" for each in fired if each not in both_ways(case.alerts | case.may)]
        if scene.first is None:
            wrong.append(f"{case.name}: watch never said {case.watch}: {scene.verdicts}")
        for tool, pattern in (("doctor", case.doctor), ("report", case.report)):
            if not re.search(pattern, scene.said.get(tool, "")):
                wrong.append(f"{case.name}: {tool} did not say {pattern}: {scene.said.get(tool)}")
        if (code := _exit_code(scene)) != str(case.code):
            wrong.append(f"{case.name}: doctor ended with {code}, expected {case.code}")
        rows.append(f"| **{case.name}**: {case.what} | {' | '.join(_cells(case, scene, fired))} |")
        (scene.base / "said.txt").write_text(
            "\n\n".join(
                [
                    *(f"== {tool}\n{text}" for tool, text in scene.said.items()),
                    *map(str, scene.verdicts),
                    str(fired),
                ]
            )
        )
    return rows, wrong


def _cells(case: Case, scene: Scene, fired: dict[str, float]) -> list[str]:
    """What each tool says, in few words and without this machine's paths."""
    patterns = {"watch": case.watch, "doctor": case.doctor, "report": case.report}
    said = {tool: _first(scene.said.get(tool, ""), pattern) for tool, pattern in patterns.items()}
    for tool, text in said.items():
        shown = re.sub(r"(file://)?\S*/(disk|keys)/\S*?(run|key\.json)\b", r"/data/\3", text)
        said[tool] = re.sub(r" +", " ", shown).replace("|", "/")[:_SHOWN] + (" ..." if len(shown) > _SHOWN else "")
    again = next(
        (one for one in scene.verdicts if one.seconds > (scene.first or 0) and one.text.startswith("HEALTHY")), None
    )
    later = f"; {again.seconds:.0f} s: HEALTHY again" if again and case.flags != Case.flags else ""
    watch = f"{scene.first:.0f} s: {said['watch']}{later}" if scene.first is not None else "-"
    alerts = "; ".join("`{1}` {2:.0f} s ({0})".format(*name.split(), at) for name, at in fired.items()) or "none"
    return [watch, f"exit code {_exit_code(scene)}: {said['doctor']}", alerts, said["report"]]


def _exit_code(scene: Scene) -> str:
    """`doctor`'s."""
    found = re.search(r"exit code (\d+)\Z", scene.said.get("doctor", ""))
    return found[1] if found else "unknown"


def both_ways(alerts: frozenset[str]) -> frozenset[str]:
    """`endpoint NAME` and `file NAME` of those that say neither."""
    return frozenset(
        each for name in alerts for each in ([name] if " " in name else [f"endpoint {name}", f"file {name}"])
    )


def _first(text: str, pattern: str) -> str:
    """The line that a pattern was found in."""
    found = re.search(pattern, text)
    if found is None:
        return "-"
    at = found.end() - 1
    return text[text.rfind("\n", 0, at) + 1 : (text + "\n").find("\n", at)].strip()


if __name__ == "__main__":
    sys.exit(main())

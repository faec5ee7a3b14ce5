"""`make demo`: a job of 4 simulated hosts loses one in the middle of a save and resumes on 2, with another mesh.

With `STORAGE=gcs` the run is kept in a bucket of the emulator (`launch.gcs_emulator`), which ends with the demo.

Every claim it prints is checked on what the job left behind; it ends with 1 if one does not hold.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags, logging
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import orchestrator as oc
from launch import programs
from launch.engines import local
from launch.example.report import ProgressLine, Summary
from launch.gcs_emulator.process import EmulatorProcess
from launch.supervise import RestartPolicy
from orchestrator.environment import FAILPOINTS
from orchestrator.rules import keys
from orchestrator.rules.arguments import path as local_path
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.storage import open_storage

FLAGS = flags.FLAGS
flags.DEFINE_string("root", "demo-run", "where the demo writes; made again each time")
flags.DEFINE_enum("storage", "local", ["local", "gcs"], "where the run is: below --root, or in an emulated bucket")
flags.DEFINE_string("run", "", "where the run is instead: a new root, such as one in a bucket that there is")
flags.DEFINE_integer("steps", 60, "steps of the whole run", lower_bound=30)
flags.DEFINE_multi_string("train", [], "a flag for what is trained: --train=--width=128; can be repeated")

SAVE_EVERY = 10
KILLED_HOST = 2
CUT_STEP = 30  # the save that is cut off; the last step's if that comes first
BUCKET = "demo-bucket"  # of the emulator
MARK = ".demo"  # marks a directory as ours to delete


class DemoFailed(Exception):
    """Something that the demo shows does not hold; one line."""


@dataclass
class TrainedPart:
    """One start of the job: what it printed, step by step."""

    losses: dict[int, float] = field(default_factory=dict)
    saved_digests: dict[int, str] = field(default_factory=dict)
    code: int = -1


def prepare(root: Path) -> None:
    """An empty directory of ours. Raises DemoFailed if there is something that the demo has not made."""
    if root.exists():
        if not (root / MARK).exists():
            raise DemoFailed(f"--root={root} exists and was not made by the demo; name another directory")
        shutil.rmtree(root)
    root.mkdir(parents=True)
    (root / MARK).touch()


def train_command(root: Path, run: str, mesh: str, steps: int) -> list[str]:
    return [
        *programs.command("train"),
        *(f"--root={run}", f"--steps={steps}", f"--mesh={mesh}"),
        *(f"--save_every={SAVE_EVERY}", "--keep_last=3", "--log_every=1", "--digests"),
        f"--summary={root / 'summary.json'}",
        *FLAGS.train,
    ]


def run_part(
    root: Path,
    job: local.LocalJob,
    about: str,
    steps: int,
    console: Console,
    kill: Callable[[TrainedPart, Any], None] | None,
) -> TrainedPart:
    """Run the job, with a bar on a terminal; `kill` is asked about ten times a second."""
    part = TrainedPart()
    notes: list[str] = []
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    display = Progress(*columns, console=console) if console.is_terminal else nullcontext(None)
    with open(root / "demo.log", "a") as log, display as progress:
        task = progress.add_task(about, total=steps) if progress else None
        if not progress:
            console.print(about, markup=False)

        def line(host: str, text: str) -> None:
            log.write(f"[{host}] {text}\n")
            parsed = ProgressLine.parse(text)
            if parsed and parsed.loss is not None:
                part.losses[parsed.step] = parsed.loss
                if progress and task is not None:
                    progress.update(task, completed=parsed.step + 1)
            elif parsed and parsed.digest:
                part.saved_digests[parsed.step] = parsed.digest

        def note(text: str) -> None:
            log.write(f"[launch] {text}\n")
            notes.append(text)

        def tick(running: Sequence[local.HostView]) -> None:
            if kill:
                kill(part, running)

        part.code = local.run(job, local.Observer(line, note, tick))
    for text in notes:
        console.print(f"  launch: {text}", highlight=False, markup=False)
    return part


class Killer:
    """Kills one host, once, when the save of `step` has begun and is not committed."""

    def __init__(self, run: str, step: int) -> None:
        self._run, self.step = run, step
        self.done = False

    def __call__(self, part: TrainedPart, running: Sequence[local.HostView]) -> None:
        if self.done or max(part.losses, default=0) < self.step:
            return
        found = (AttemptId.in_key(entry.key) for entry in open_storage(self._run).list(keys.STEPS))
        begun = {part[0].step for part in found if part and part[1] == keys.INTENT}
        victim = next((host for host in running if host.index == KILLED_HOST), None)
        if victim and self.step in begun - set(oc.open_run(self._run).all_steps()):
            os.kill(victim.pid, signal.SIGKILL)
            self.done = True


def check(holds: bool, claim: str, console: Console) -> None:
    console.print("[green]ok[/] " if holds else "[red]NO[/] ", escape(claim), highlight=False)
    if not holds:
        raise DemoFailed(claim)


def draw(path: Path, first: TrainedPart, second: TrainedPart, cut_step: int, restored_step: int) -> None:
    """The loss curve across the break."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), dpi=120, layout="constrained")
    for part, color, width, label in (
        (first, "#9ec5e8", 6, "4 hosts, data=4 x model=2"),  # wide and below: the second one goes over it again
        (second, "#cc3344", 1.8, "2 hosts, data=2 x model=2"),
    ):
        axes.plot(list(part.losses), list(part.losses.values()), color=color, lw=width, label=label)
    axes.axvline(cut_step, color="#888888", ls=":", lw=1.2)
    axes.annotate(
        f"host-{KILLED_HOST} killed\nsaving step {cut_step}",
        (cut_step, axes.get_ylim()[1]),
        xytext=(6, -4),
        textcoords="offset points",
        va="top",
        color="#555555",
    )
    restored_loss = first.losses[restored_step]
    axes.plot([restored_step], [restored_loss], "o", color="#222222", ms=6, zorder=5)
    axes.annotate(
        f"restored step {restored_step}",
        (restored_step, restored_loss),
        xytext=(-24, 48),
        textcoords="offset points",
        ha="center",
        arrowprops={"arrowstyle": "-", "color": "#555555"},
        color="#222222",
    )
    axes.set(xlabel="step", ylabel="training loss", title="One run, two meshes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def demo(root: Path, run: str, steps: int, console: Console) -> None:
    """Raises DemoFailed if anything that it shows does not hold."""
    started = time.monotonic()
    rules = RestartPolicy(end_grace_s=1.0)

    killer = Killer(run, min(CUT_STEP, steps - 1))
    # That save's receipt waits, so that it is caught in the middle on however slow a machine.
    slow = {FAILPOINTS: f"receipt.write=delay:60@process={KILLED_HOST}@step={killer.step}"}
    job = local.LocalJob(train_command(root, run, "data=4,model=2", steps), 4, 2, environ=slow, policy=rules)
    first = run_part(root, job, "training on 4 hosts x 2 devices", steps, console, killer)
    if not killer.done:
        raise DemoFailed(
            f"no save could be caught in the middle (the job ended with {first.code}); see {root}/demo.log"
        )
    steps_left = oc.open_run(run).all_steps()
    check(
        killer.step not in steps_left,
        f"host-{KILLED_HOST} was killed while step {killer.step} was being saved",
        console,
    )
    console.print(f"    restorable now: {', '.join(map(str, steps_left))}", highlight=False, markup=False)

    job = local.LocalJob(train_command(root, run, "data=2,model=2", steps), 2, 2, policy=rules)
    second = run_part(root, job, "resuming on 2 hosts x 2 devices, mesh data=2,model=2", steps, console, None)
    if second.code != 0:
        raise DemoFailed(f"the resumed job ended with {second.code}; see {root}/demo.log")
    summary = Summary.read(root / "summary.json")
    restored = summary.restored_step
    check(restored == max(steps_left), f"the job resumed from step {restored}, the newest committed one", console)
    assert restored is not None
    digest = first.saved_digests[restored]
    check(summary.restored_digest == digest, f"its state is bit for bit what was saved ({digest[:16]}...)", console)
    check(summary.final_step == steps - 1, f"it trained on to step {summary.final_step}", console)
    draw(root / "loss.png", first, second, killer.step, restored)
    console.print(f"    loss across the break: {root / 'loss.png'}", highlight=False, markup=False)
    console.print(f"\n$ orchestrator ls {run}", highlight=False, markup=False)
    done = subprocess.run([sys.executable, "-m", "orchestrator.cli", "ls", run], check=False, timeout=60)
    check(done.returncode == 0, f"all of it in {time.monotonic() - started:.0f} s", console)


def main(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)
    console = Console(soft_wrap=True)
    try:
        if len(argv) > 1:
            raise DemoFailed(f"unexpected {argv[1]!r}; see --help")
        local_path("--root", FLAGS.root)
        root = Path(FLAGS.root).absolute()
        prepare(root)
        if FLAGS.storage == "local":
            demo(root, FLAGS.run or str(root / "run"), FLAGS.steps, console)
            return 0
        with EmulatorProcess([BUCKET]) as emulator:
            os.environ.update(emulator.environ)
            console.print(f"an emulated bucket at {emulator.url}", highlight=False, markup=False)
            demo(root, f"gs://{BUCKET}/run", FLAGS.steps, console)
            counts = emulator.counts()
            kinds = ", ".join(f"{count} of class {kind}" for kind, count in sorted(counts["classes"].items()))
            console.print(f"    requests: {kinds}", highlight=False, markup=False)
    except (DemoFailed, local.LaunchError, oc.OrchestratorError, OSError, json.JSONDecodeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0

"""Rounds in which a job of four hosts in two racks, which holds steps with copies, loses what it holds them in.

In each the job must go on, on the newest step that process 0 has called held, without a byte of arrays from the store,
where the loss is one that the copies survive; else on one that is whole. The campaign checks the bits, the run and what
is left over, as after any round.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.gcs_emulator.process import EmulatorProcess
from tests.proof.chaos.arena import Arena
from tests.proof.chaos.faults import Round, expect
from tests.support.damage import flip
from tests.support.environ import environ

HOSTS, RACKS = range(4), ((0, 1), (2, 3))
STEPS, HOLD, SAVE = 160, 2, 30
WAIT_S = 240.0  # for a start, or an end, of four hosts on a busy machine
BUCKET = "chaos-bucket"
Line = dict[str, Any]


@dataclass
class Incident:
    """A job that holds steps, and what has become of it. started: when hosts were lost."""

    arena: Arena
    job: subprocess.Popen[bytes]
    tiers: Path
    lost_s: float = 0.0

    def lines(self, event: str, restart: int | None = None) -> list[Line]:
        return [line for line in self.arena.story(event) if restart in (None, line["restart"])]

    def until_held(self, steps: int) -> None:
        """So many more steps are called held."""
        before = len(self._told())
        self.arena.until(f"{steps} steps are held", lambda: len(self._told()) >= before + steps, WAIT_S, self.job)

    def _told(self) -> list[Line]:
        return [line for line in self.lines("StepHeld") if line["process"] == 0]

    @property
    def newest_held(self) -> int:
        return max((line["step"] for line in self._told() if line["time"] < self.lost_s), default=-1)

    @property
    def newest_saved(self) -> int:
        return max((line["step"] for line in self.lines("saved") if line["time"] < self.lost_s), default=-1)

    def pids(self, processes: Collection[int]) -> list[int]:
        return [line["pid"] for line in self.lines("opened", 0) if line["process"] in processes]

    def kill(self, processes: Collection[int]) -> None:
        self.lost_s = time.monotonic()
        for pid in self.pids(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def back(self) -> list[Line]:
        """What the processes of the first start that has come back say. They all came back on the same step."""

        def all_back() -> list[Line]:
            for restart in range(1, 20):
                if len(found := self.lines("opened", restart)) == len(HOSTS):
                    return found
            return []

        found: list[Line] = self.arena.until("all are back", all_back, WAIT_S, self.job)
        expect(len({line["restored"] for line in found}) == 1, f"came back on {found}", self.arena)
        return found

    def came_back_on_the_newest(self) -> str:
        found = self.back()
        step, told = found[0]["restored"], self.newest_held
        expect(step is not None and step >= told, f"came back on {step}, step {told} had been held", self.arena)
        stored = sum(line["sources"].get("store", 0) for line in found)
        expect(not stored or step == self.newest_saved, f"{stored} bytes came from the store", self.arena)
        return "came back on the newest held step, 0 bytes from the store"

    def ends_well(self) -> None:
        code = self.arena.wait(self.job, WAIT_S)
        expect(code == 0, f"exit code {code}", self.arena)
        self.arena.check()


@contextlib.contextmanager
def incident(arena: Arena, *flags: str, **environ: str) -> Iterator[Incident]:
    """A job that holds steps; both are ended with the context, and the tiers removed."""
    above = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else arena.base
    tiers = above / f"chaos-{arena.mark}"
    all_flags = ["--tiers", f"--tier_dir={tiers}", "--domains=2", "--max_restarts=8", *flags]
    args = (f"hold={HOLD}", f"save={SAVE}", "delay=0.1", "deadline=60")
    job = arena.launch(*args, more=STEPS, flags=all_flags, processes=len(HOSTS), **environ)
    try:
        found = Incident(arena, job, tiers)
        found.until_held(3)
        yield found
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(5)
        arena.end()
        shutil.rmtree(tiers, ignore_errors=True)


LOSE = "--lose_tier_on_kill"


def hosts_lost(processes: tuple[int, ...], after_s: float) -> Round:
    def run(arena: Arena) -> str:
        with incident(arena, LOSE) as found:
            time.sleep(after_s)
            found.kill(processes)
            outcome = found.came_back_on_the_newest()
            found.ends_well()
        return outcome

    several = len(processes) > 1
    kind = "two hosts of a rack are lost with their memory" if several else "a host is lost with its memory"
    return Round(f"tiers: {kind}", f"{processes} after {after_s:.2f} s", run, fresh=True)


def all_crash(after_s: float) -> Round:
    def run(arena: Arena) -> str:
        with incident(arena) as found:
            time.sleep(after_s)
            found.kill(HOSTS)
            outcome = found.came_back_on_the_newest()
            found.ends_well()
        return outcome

    return Round("tiers: all hosts' processes are killed, memory stays", f"after {after_s:.2f} s", run, fresh=True)


def too_many_lost(spared: int, after_s: float) -> Round:
    """More than the copies survive: the newest step that is saved, or a held one that happens to be whole."""

    def run(arena: Arena) -> str:
        with incident(arena, LOSE) as found:
            arena.until("a step is saved", lambda: found.lines("saved"), WAIT_S, found.job)
            time.sleep(after_s)
            found.kill([host for host in HOSTS if host != spared])
            step = found.back()[0]["restored"]
            saved = found.newest_saved
            expect(step is not None and step >= saved, f"came back on {step}, step {saved} was saved", arena)
            found.ends_well()
        return "came back on the newest saved step"

    return Round("tiers: three hosts of four are lost with their memory", f"all but {spared}", run, fresh=True)


def wrong_bytes(lost: int, all_steps: bool) -> Round:
    """The copies of a host's part turn wrong under their server, and then that host is lost."""

    def run(arena: Arena) -> str:
        with incident(arena, LOSE) as found:
            for pid in found.pids(HOSTS):  # nothing new is held meanwhile
                os.kill(pid, signal.SIGSTOP)
            steps = sorted(found.tiers.glob(f"host-*/*/*/process-{lost:05d}/steps/*"))
            steps = [step for step in steps if f"/host-{lost}/" not in str(step)]
            newest = max((step.name for step in steps), default="")
            files = [
                file
                for step in steps
                for file in step.rglob("state/**/d/*")
                if file.is_file() and (all_steps or step.name == newest)
            ]
            expect(files, f"no copies of process {lost} in {found.tiers}", arena)
            for file in files:
                flip(file)
            found.kill([lost])
            step = found.back()[0]["restored"]
            held = {line["step"] for line in found.lines("StepHeld", 0)}
            expect(step in held or step == found.newest_saved, f"came back on {step}, held were {held}", arena)
            expect(step != int(newest), f"came back on {step}, of which all copies of a part were wrong", arena)
            named = [line for line in arena.story() if line["event"] in ("CopyDropped", "HeldStepDropped")]
            expect(named, "nobody was told", arena)
            found.ends_well()
        return "named and dropped; came back on an older step"

    what = "of all steps" if all_steps else "of the newest step"
    return Round("tiers: a peer serves wrong bytes", f"{what}, host {lost} is lost", run, fresh=True)


def server_of(tiers: Path, host: int) -> int:
    """The id of a host's tier server."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                if "tier_server" in words and f"{tiers}/host-{host}/" in words.replace("\0", "/"):
                    return int(entry.name)
    return -1


@contextlib.contextmanager
def slowed(pid: int, part: float) -> Iterator[None]:
    """The process runs only a part of the time."""
    ended = threading.Event()

    def turn() -> None:
        while not ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                ended.wait(0.2 * (1 - part))
                os.kill(pid, signal.SIGCONT)
            ended.wait(0.2 * part)

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def slow_peer(slow: int, lost: int) -> Round:
    def run(arena: Arena) -> str:
        with incident(arena, LOSE) as found:
            pid = server_of(found.tiers, slow)
            expect(pid > 0, f"host {slow} has no tier server in {found.tiers}", arena)
            with slowed(pid, 0.1):
                found.until_held(2)
                found.kill([lost])
                outcome = found.came_back_on_the_newest()
            found.ends_well()
        return outcome

    return Round("tiers: a slow peer, and a host is lost", f"host {slow} at a tenth, host {lost}", run, fresh=True)


def store_down(lost: int, more_s: float) -> Round:
    """Nobody can reach the store: not while steps are held, not when a host is lost, and not for a while after."""

    def run(arena: Arena) -> str:
        server = EmulatorProcess([BUCKET])
        arena.url = f"gs://{BUCKET}/{arena.mark}/run"
        try:
            with environ(server.environ), incident(arena, LOSE) as found:  # for those who check the run
                arena.until("a step is saved", lambda: found.lines("saved"), WAIT_S, found.job)
                server.set_faults(down=True)
                found.until_held(3)
                found.kill([lost])
                time.sleep(more_s)
                server.set_faults()
                outcome = found.came_back_on_the_newest()
                found.ends_well()
        finally:
            server.end()
        return f"held on, and {outcome} once the store answered"

    return Round("tiers: the store is down, and a host is lost", f"host {lost}, {more_s:.1f} s", run, fresh=True)


def sweep(source: random.Random) -> Iterator[Round]:
    moments: Callable[[], float] = lambda: source.uniform(0, 1.0)  # noqa: E731
    yield hosts_lost((source.choice(HOSTS),), moments())
    yield hosts_lost(source.choice(RACKS), moments())
    yield all_crash(moments())
    yield too_many_lost(source.choice(HOSTS), moments())
    for all_steps in (False, True):
        yield wrong_bytes(source.choice(HOSTS), all_steps)
    slow = source.choice(HOSTS)
    yield slow_peer(slow, source.choice([host for host in HOSTS if host != slow]))
    yield store_down(source.choice(HOSTS), source.uniform(1, 5))

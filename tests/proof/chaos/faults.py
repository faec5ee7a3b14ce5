"""The kinds of rounds. Each does its damage to an arena's job and returns what became of it, in a few words.

A round raises Unexpected where the job did not do what it should; what holds of every run is checked by the campaign.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import failpoints
from tests.proof.chaos import check
from tests.proof.chaos.arena import REPOSITORY, Arena, stopped
from tests.proof.chaos.network import network, why_not

ROUND_S = 90.0  # a start takes about 3 s here, an end that JAX must notice up to 30 s
DEADLINE_S = 4  # save_timeout_s of jobs in which somebody falls silent
ABORT_S = 5.0  # all hosts know of an abort within

ON_PROCESS_0 = ("epoch.", "intent.", "finalize.", "manifest.", "commit.", "abort.", "collect.")
NEEDS_A_FAILURE = frozenset({"abort.before", "abort.after"})


class Unexpected(Exception):
    """The job did something else."""


@dataclass(frozen=True)
class Round:
    kind: str
    what: str
    run: Callable[[Arena], str]
    fresh: bool = False  # wants an arena of its own


def expect(true: object, what: str, arena: Arena) -> None:
    if not true:
        raise Unexpected(f"{what}: {arena.tail()}")


def restarts(arena: Arena) -> int:
    return max((line["restart"] for line in arena.story("opened")), default=0)


def chaos(place: str, action: str, process: int) -> str:
    """A rule for the first incarnation only. A place on the way of an abort needs a NO to get there."""
    rule = f"{place}={action}@process={process}@restart=0@nth=1"
    return f"save.write=error@process=1@restart=0@nth=2;{rule}" if place in NEEDS_A_FAILURE else rule


def where(place: str, source: random.Random) -> int:
    return 0 if place.startswith(ON_PROCESS_0) else source.randrange(2)


def kill_at(place: str, process: int) -> Round:
    def run(arena: Arena) -> str:
        job = arena.launch(flags=[f"--chaos={chaos(place, 'kill', process)}", "--max_restarts=2"])
        code = arena.wait(job, ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        return "killed, restarted" if "was ended by SIGKILL" in arena.logs[-1].read_text() else "place not reached"

    return Round("SIGKILL at a failpoint", f"{place}, process {process}", run)


def fault_at(place: str, action: str, process: int) -> Round:
    def run(arena: Arena) -> str:
        before = len(arena.story("failed"))
        job = arena.launch(flags=[f"--chaos={chaos(place, action, process)}", "--max_restarts=2"])
        code = arena.wait(job, ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        failed = arena.story("failed")[before:]
        slow = [line for line in failed if line["seconds"] > ABORT_S]
        expect(not slow, f"hosts learned of the abort only after {slow}", arena)
        if " on 2 hosts in " in arena.logs[-1].read_text():
            return "job failed at start, restarted"
        return "save aborted, training continued" if failed else "no save failed"

    return Round("error, ENOSPC, EIO, no memory or short write at a failpoint", f"{action} at {place}", run)


def kill_at_random(process: int, after_s: float) -> Round:
    def run(arena: Arena) -> str:
        opened = len(arena.story("opened"))
        job = arena.launch("delay=0.01", more=40, flags=["--max_restarts=2"])
        arena.until("both are up", lambda: len(arena.story("opened")) >= opened + 2, 60, job)
        time.sleep(after_s)
        pid = [line["pid"] for line in arena.story("opened") if line["process"] == process][-1]
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return "had ended before"
        code = arena.wait(job, ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        return "killed, restarted"

    return Round("SIGKILL at a random moment", f"process {process} after {after_s:.2f} s", run)


def sigterm(process: int, after_s: float) -> Round:
    def run(arena: Arena) -> str:
        opened, before = len(arena.story("opened")), len(arena.story("preempted"))
        job = arena.launch("delay=0.02", more=100)  # no restart is paid for
        arena.until("both are up", lambda: len(arena.story("opened")) >= opened + 2, 60, job)
        time.sleep(after_s)
        pid = [line["pid"] for line in arena.story("opened") if line["process"] == process][-1]
        os.kill(pid, signal.SIGTERM)
        code = arena.wait(job, ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        left = {line["step"] for line in arena.story("preempted")[before:]}
        if not left and restarts(arena) == 0:
            return "had ended before"
        expect(len(left) == 1, f"left at steps {left}", arena)
        saved = {line["step"] for line in arena.story("saved")}
        expect(left <= saved, f"step {left} was not saved before leaving", arena)
        return "saved one step on both, left with 75, resumed"

    return Round("SIGTERM to one host", f"process {process} after {after_s:.2f} s", run)


def zombie(place: str, process: int) -> Round:
    """Stopped at `place`, while another incarnation starts, trains and ends; then it wakes up."""

    def run(arena: Arena) -> str:
        opened = len(arena.story("opened"))
        # Process 0 creates a journal entry when it opens the run, and one more when it has restored.
        nth = 4 if place == "storage.link" else 2
        rule = f"{place}=stop@process={process}@restart=0@nth={nth}"
        old = arena.launch(f"deadline={DEADLINE_S}", flags=[f"--chaos={rule}", "--hang_after_s=0", "--end_grace_s=10"])
        arena.until("the old one is up", lambda: len(arena.story("opened")) >= opened + 2, 60, old)
        pids = [line["pid"] for line in arena.story("opened")[opened:]]
        asleep = arena.until("it is stopped", lambda: [pid for pid in pids if stopped(pid)], 30, old)
        code = arena.wait(arena.launch(f"deadline={DEADLINE_S}"), ROUND_S)
        expect(code == 0, f"the new incarnation ended with {code}", arena)
        for pid in asleep:
            os.kill(pid, signal.SIGCONT)
        code = arena.wait(old, ROUND_S)
        # Its peer may have ended it before it could tell; the journal shows what it did meanwhile.
        expect(code in (5, 134, 1), f"the zombie ended with {code}", arena)
        return "fenced, exit code 5" if code == 5 else "ended by its peer's end"

    return Round("zombie: SIGSTOP, a newer epoch, SIGCONT", f"{place}, process {process}", run)


def hang(place: str, process: int) -> Round:
    def run(arena: Arena) -> str:
        rule = f"{place}=stop@process={process}@restart=0@nth=2"
        job = arena.launch(f"deadline={DEADLINE_S}", flags=[f"--chaos={rule}", "--hang_after_s=8", "--max_restarts=2"])
        code = arena.wait(job, ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        return "killed as hung, restarted" if "restart 1" in arena.logs[-1].read_text() else "place not reached"

    return Round("SIGSTOP for longer than the deadline, supervised", f"{place}, process {process}", run)


def full_disk(free_kib: int) -> Round:
    """The run lies on a small tmpfs; something else fills it, and later makes room again."""

    def run(arena: Arena) -> str:
        mount = arena.root.parent
        mount.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", mount], check=True)
        try:
            job = arena.launch("delay=0.2", "kib=512", more=30, flags=["--max_restarts=1"])
            arena.until("two steps are saved", lambda: len(arena.story("saved")) >= 4, 60, job)
            ballast = mount / "ballast"
            with contextlib.suppress(OSError):  # the job may be faster: then it is full
                ballast.write_bytes(b"\0" * max(0, shutil.disk_usage(mount).free - (free_kib << 10)))
            arena.until("saves fail", lambda: len(arena.story("failed")) >= 4, 60, job)
            ballast.unlink()
            before = len(arena.story("saved"))
            arena.until("saves work again", lambda: len(arena.story("saved")) >= before + 2, 60, job)
            code = arena.wait(job, ROUND_S)
            expect(code == 0 and restarts(arena) == 0, f"exit code {code}", arena)
            slow = [line for line in arena.story("failed") if line["seconds"] > ABORT_S]
            expect(not slow, f"hosts learned of the abort only after {slow}", arena)
            arena.check()
        finally:
            arena.end()
            subprocess.run(["umount", mount], check=True)
        return "saves aborted, training continued, saved again"

    return Round("full disk (tmpfs)", f"{free_kib} KiB left", run, fresh=True)


def system_call(inject: str, process: int) -> Round:
    def run(arena: Arena) -> str:
        before = len(arena.story("failed"))
        job = arena.launch(more=8, flags=["--max_restarts=2"], CHAOS_STRACE=f"{process}:{inject}")
        code = arena.wait(job, ROUND_S)
        failed = arena.story("failed")[before:]
        if code and process == 0:  # an epoch that cannot be opened: the job says so and changes nothing
            expect(code == 1, f"exit code {code}", arena)
            return "no epoch could be opened: job failed"
        expect(code == 0, f"exit code {code}", arena)
        return "save aborted, training continued" if failed else "no save failed"

    return Round("failing system call (strace)", f"{inject}, process {process}", run)


def clock(seconds: float, kill: bool) -> Round:
    def run(arena: Arena) -> str:
        flags = ["--max_restarts=2", *(["--chaos=commit.before=kill@restart=0@nth=3"] if kill else [])]
        code = arena.wait(arena.launch(f"jump={seconds}", flags=flags), ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        return "no difference"

    return Round("clock jumps", f"up to {seconds:g} s at each step{', and a kill' if kill else ''}", run)


def faulty_file_system(operation: str, error: str, every: int) -> Round:
    """The run lies on a FUSE file system that fails now and then, for a while."""

    def run(arena: Arena) -> str:
        mount, backing, control = arena.root.parent, arena.base / "backing", arena.base / "control"
        mount.mkdir()
        backing.mkdir()
        files = [str(backing), str(mount), str(control)]
        server = subprocess.Popen([sys.executable, "-m", "tests.proof.chaos.faulty_fs", *files], cwd=REPOSITORY)
        try:
            arena.until("it is mounted", lambda: os.path.ismount(mount), 20, server)
            job = arena.launch("delay=0.1", more=40, flags=["--max_restarts=2"])
            arena.until("two steps are saved", lambda: len(arena.story("saved")) >= 4, 60, job)
            control.write_text(f"{operation} {error} {every}")
            time.sleep(1.5)
            control.unlink()
            before = len(arena.story("saved"))
            arena.until("saves work again", lambda: len(arena.story("saved")) >= before + 2, 60, job)
            code = arena.wait(job, ROUND_S)
            expect(code == 0, f"exit code {code}", arena)
            arena.check()
            expect(not arena.end(), "processes were left over", arena)
        finally:
            arena.end()
            subprocess.run(["umount", "--lazy", mount], check=False)
            server.terminate()
            server.wait(10)
        return "saves aborted, training continued, saved again" if arena.story("failed") else "no save failed"

    return Round("failing file system (FUSE)", f"every {every}th {operation}: {error}", run, fresh=True)


def cut_network(index: int, after_s: float) -> Round:
    """A host's link goes down in the middle of training. JAX notices, after its heartbeat, and ends both processes."""

    def run(arena: Arena) -> str:
        with network(2, arena.base) as net:
            arena.steps = 100_000
            jobs = net.start(arena, 0, f"deadline={DEADLINE_S}")
            arena.until("steps are saved", lambda: len(arena.story("saved")) >= 6, 60, jobs[0])
            time.sleep(after_s)
            net.cut(index)
            codes = [arena.wait(job, ROUND_S) for job in jobs]
            expect(all(codes), f"exit codes {codes}", arena)
            net.mend(index)
            arena.steps = max(line["step"] for line in arena.story("saved")) + 5
            codes = [arena.wait(job, ROUND_S) for job in net.start(arena, 1)]
            expect(codes == [0, 0], f"exit codes {codes} after the network was mended", arena)
            arena.check()
            expect(not arena.end(), "processes were left over", arena)
        return "both hosts ended, the job resumed"

    return Round("cut network (namespaces)", f"host {index} after {after_s:.2f} s", run, fresh=True)


def stranger(saves: bool) -> Round:
    """Somebody mistypes a root: another job, with another tree, comes to a run that is being trained."""
    act = "agent.save(10**6, like)" if saves else "agent.restore(like)"
    other = f"import numpy, orchestrator as oc; like = {{'theirs': numpy.zeros(3)}}; agent = oc.Agent(ROOT); {act}"

    def run(arena: Arena) -> str:
        saved, opened = len(arena.story("saved")), len(arena.story("opened"))
        job = arena.launch("delay=0.1", more=40)
        arena.until("a step is saved", lambda: len(arena.story("saved")) >= saved + 2, 60, job)
        came = arena.start([sys.executable, "-c", other.replace("ROOT", repr(str(arena.root)))], JAX_PLATFORMS="cpu")
        code, said = arena.wait(came, ROUND_S), arena.tail()
        expect(
            code == 1 and ("OtherJob" in said or "Mismatch" in said), f"the stranger ended with {code}: {said}", arena
        )
        code = arena.wait(job, ROUND_S)
        again = [line for line in arena.story("opened")[opened:] if line["restart"]]
        expect(code == 0 and not again, f"exit code {code}, started again: {again}", arena)
        return "the stranger was rejected, training continued"

    return Round("another job at the same root", "saves" if saves else "restores", run, fresh=False)


def root_taken(how: str, after_s: float) -> Round:
    """The root is renamed under the job; later it is put back."""

    def run(arena: Arena) -> str:
        saved, aside = len(arena.story("saved")), arena.base / "aside"
        job = arena.launch("delay=0.05", more=200)
        arena.until("a step is saved", lambda: len(arena.story("saved")) >= saved + 2, 60, job)
        time.sleep(after_s)
        arena.root.rename(aside)
        if how == "another in its place":
            arena.root.mkdir()
        code = arena.wait(job, ROUND_S)
        expect(code == 5, f"exit code {code}", arena)
        if how == "another in its place":
            expect(
                not list(arena.root.iterdir()), f"written to the other root: {list(arena.root.rglob('*'))[:5]}", arena
            )
            arena.root.rmdir()
        expect(not arena.root.exists(), "the root was made again", arena)
        aside.rename(arena.root)
        arena.steps = max(line["step"] for line in arena.story("saved")) + 1
        code = arena.wait(arena.launch(), ROUND_S)
        expect(code == 0, f"exit code {code} after it was put back", arena)
        return "ended with 5, nothing written elsewhere, resumed when it was back"

    return Round("the root renamed under the job", f"{how}, after {after_s:.2f} s", run)


def journal_lost(how: str, entries: int) -> Round:
    """An interrupted copy: entries of the journal are missing when the job comes back; then they are there."""

    def run(arena: Arena) -> str:
        code = arena.wait(arena.launch(), ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        names = sorted((arena.root / "journal").iterdir())
        taken = names if how == "all" else names[-entries:] if how == "newest" else names[-entries - 1 : -1]
        kept = {path: path.read_bytes() for path in taken}
        for path in taken:
            path.unlink()
        before = {path for path in arena.root.rglob("*") if "events" not in path.parts}
        job = arena.launch()
        code = arena.wait(job, ROUND_S)
        rejected = "JournalLost" in arena.tail()
        after = {path for path in arena.root.rglob("*") if "events" not in path.parts}
        if rejected:
            expect(code == 4 and after == before, f"exit code {code}, new: {after - before}", arena)
        for path, body in kept.items():
            expect(rejected or not path.exists() or path.read_bytes() == body, f"{path} was written again", arena)
            path.write_bytes(body)
        expect(rejected, f"exit code {code}: a lost journal was not noticed", arena)
        code = arena.wait(arena.launch(), ROUND_S)
        expect(code == 0, f"exit code {code} with the journal whole again", arena)
        return "rejected, nothing written, resumed when it was whole"

    return Round("entries of the journal missing", f"{how}, {entries}", run)


def flipped(fraction: float) -> Round:
    """A bit of the newest step is wrong for a while: quarantined, then right again and released."""

    def run(arena: Arena) -> str:
        code = arena.wait(arena.launch(), ROUND_S)
        expect(code == 0, f"exit code {code}", arena)
        newest = check.cli(arena.root, "ls")[1]["newest"]
        file = max(arena.root.glob(f"steps/{newest:08d}/*/state/**/d/*"), key=lambda path: path.stat().st_size)
        body = file.read_bytes()
        broken = bytearray(body)
        broken[int(fraction * (len(body) - 1))] ^= 16
        file.write_bytes(broken)
        code, told, _ = check.cli(arena.root, "verify", "--all")
        expect(code == 4, f"verify ended with {code}: {told}", arena)
        listed = check.cli(arena.root, "ls")[1]
        expect(listed["newest"] != newest, "the damaged step is still the newest", arena)
        file.write_bytes(body)
        code, told, _ = check.cli(arena.root, "verify", "--all")
        expect(code == 0 and check.cli(arena.root, "ls")[1]["newest"] == newest, f"verify, right again: {told}", arena)
        opened = len(arena.story("opened"))
        code = arena.wait(arena.launch(), ROUND_S)
        came_up = {line["restored"] for line in arena.story("opened")[opened:]}
        expect(code == 0 and came_up == {newest}, f"exit code {code}, came up on {came_up}, expected {newest}", arena)
        return "quarantined, released when it was right again"

    return Round("a wrong bit, for a while", f"at {fraction:.2f}", run)


def tools() -> dict[str, str]:
    """What a kind of round needs and this machine lacks, by kind; the reason it is skipped."""
    missing = {}
    if shutil.which("strace") is None:
        missing["failing system call (strace)"] = "strace is not installed"
    if os.geteuid() != 0:
        missing["full disk (tmpfs)"] = "mounting needs root"
    try:
        importlib.import_module("fuse")
    except (ImportError, OSError) as error:
        missing["failing file system (FUSE)"] = f"fusepy and libfuse 2 are needed: {error}"
    if reason := why_not():
        missing["cut network (namespaces)"] = reason
    return missing


Sweep = Callable[[random.Random], Iterator[Round]]


def plan(seed: int, *more: Sweep) -> Iterator[Round]:
    """Rounds without end, the same for the same seed: each sweep goes through all kinds in a random order. more: kinds
    that are not here."""
    source = random.Random(seed)
    missing = tools()
    while True:
        sweep = [*_sweep(source), *(one for others in more for one in others(source))]
        source.shuffle(sweep)
        yield from (one for one in sweep if one.kind not in missing)


def _sweep(source: random.Random) -> Iterator[Round]:
    places = sorted(place for place in failpoints.PLACES if not place.startswith("upload."))  # there is no tier
    for place in places:
        yield kill_at(place, where(place, source))
        action = source.choice(["error", "enospc", "eio", "memory", "short"])
        yield fault_at(place, action, where(place, source))
    for _ in range(8):
        yield kill_at_random(source.randrange(2), source.uniform(0, 1.0))
        yield sigterm(source.randrange(2), source.uniform(0, 1.0))
    for place in ("commit.before", "manifest.after", "finalize.before", "receipt.write", "storage.link", "save.seal"):
        yield zombie(place, where(place, source))
    for place in source.sample(["save.write", "receipt.after", "storage.sync", "commit.before"], 2):
        yield hang(place, where(place, source))
    for operation, error in (("write", "EIO"), ("write", "ENOSPC"), ("fsync", "EIO"), ("link", "EIO"), ("read", "EIO")):
        yield faulty_file_system(operation, error, source.randrange(2, 12))
    for index in range(2):
        yield cut_network(index, source.uniform(0, 0.5))
    for _ in range(2):
        yield full_disk(source.randrange(0, 300))
    for call, error in (("fsync", "EIO"), ("fsync", "ENOSPC"), ("fdatasync", "EIO"), ("link", "ENOSPC")):
        first = source.randrange(3, 12)
        yield system_call(f"{call}:error={error}:when={first}+{source.randrange(3, 9)}", source.randrange(2))
    for saves in (False, True):
        yield stranger(saves)
    for how in ("away", "another in its place"):
        yield root_taken(how, source.uniform(0, 0.3))
    for how in ("all", "newest", "a hole"):
        yield journal_lost(how, source.randrange(2, 6))
    for _ in range(2):
        yield flipped(source.random())
    for _ in range(2):
        yield clock(source.choice([10.0, 1e5, 1e9]), source.random() < 0.5)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)

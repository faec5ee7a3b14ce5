"""The incidents: how each is brought about, and what is the truth about it that every tool must say."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from tests.proof.incidents.scene import Scene

DISK_MIB = 64


@dataclass(frozen=True)
class Case:
    """watch, doctor, report: patterns of what they must say. alerts: those that must fire; `may`: others that may.
    `after`: what else people run, and a pattern of it."""

    name: str
    what: str
    strike: Callable[[Scene], None]
    watch: str
    doctor: str
    report: str
    alerts: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ("--hang_after_s=0",)
    args: tuple[str, ...] = ()
    place: str = "disk"
    look_s: float = 40.0  # when doctor and report are asked
    code: int = 0  # doctor's


def nothing(scene: Scene) -> None:
    """The control: a job that is well."""


def freeze(scene: Scene) -> None:
    os.kill(scene.pid(1), signal.SIGSTOP)


def kill_host(scene: Scene) -> None:
    """Its launcher is stopped first: as on machines where nobody notices until JAX does."""
    os.kill(scene.launcher.pid, signal.SIGSTOP)
    os.kill(scene.pid(1), signal.SIGKILL)


def slow_down(scene: Scene) -> None:
    (scene.folder / "slow").touch()


def fill_disk(scene: Scene) -> None:
    with contextlib.suppress(OSError), (scene.base / "disk" / "somebody-elses").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def revoke(scene: Scene) -> None:
    assert scene.bucket is not None
    scene.bucket.revoke()


def flip_and_restart(scene: Scene) -> None:
    """One bit of the newest step's largest file; then a host dies, and the launcher starts the job again."""
    newest = max((scene.local / "steps").iterdir())
    committed = [path for path in newest.rglob("manifest.json")]
    while not committed:  # it is being saved: the one before
        newest = newest.parent / f"{int(newest.name) - 20:08d}"
        committed = list(newest.rglob("manifest.json"))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.kill(scene.pid(1), signal.SIGKILL)


def kill_all(scene: Scene) -> None:
    os.kill(scene.launcher.pid, signal.SIGKILL)
    for index in (0, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(scene.pid(index), signal.SIGKILL)


def of(*names: str) -> frozenset[str]:
    return frozenset(names)


WELL = r"(?s)\A(?!.*(BAD|STALLED|NO COMMITS)).*\d+ ok"
CASES = (
    Case(
        "well", "nothing happens", nothing,
        "^(HEALTHY|SAVING) ", WELL, "The job was running",
    ),
    Case(
        "ended", "the job comes to its last step and closes", nothing,
        "^ENDED  all 2 processes closed in order", WELL, "The job ended in order",
        # An endpoint closes with the job: docs/reference/metrics.md says what follows.
        may=of("endpoint JobGone"), args=("steps=420",),
    ),
    Case(
        "frozen host", "SIGSTOP to host-1", freeze,
        r"^STALLED  host-1 \(process 1\) is frozen", r"BAD\s+hosts\s+STALLED: host-1 \(process 1\) is frozen",
        r"(?s)no step for.*host-1 (gave|has given) no sign of life",
        alerts=of("endpoint HostSilent"), may=of("NoCommit", "file HostSilent"),
        flags=("--hang_after_s=90", "--max_restarts=1"), look_s=30, code=1,
    ),
    Case(
        "dead host", "SIGKILL to host-1; nobody restarts the job", kill_host,
        r"^STALLED  host-1 \(process 1\) is dead", r"BAD\s+hosts\s+STALLED: host-1 \(process 1\) is dead",
        r"(?s)no step for.*host-1 (gave|has given) no sign of life",
        # A file is old after a minute, when JAX ends the other host, too.
        alerts=of("endpoint HostSilent"), may=of("NoCommit", "JobGone", "file HostSilent"), look_s=30, code=1,
    ),
    Case(
        "slow host", "on host-1 a file takes 2 s to become durable", slow_down,
        r"(?s)^(HEALTHY|SAVING).*slowest in step \d+: process 1 \(host-1\), durable after [1-9]",
        r"host-1.*durable after [1-9]",
        r"host-1 was the slowest", args=("slow=2",), may=of("SavesSlower"), look_s=90,
    ),
    Case(
        "full disk", "another file takes all room of the run's file system", fill_disk,
        "^NO COMMITS  .*(full|ENOSPC)", r"space .*\b0 B free",
        "saves? (was|were) aborted.*(ENOSPC|full)|full", alerts=of("DiskNearlyFull", "SavesAborted"),
        may=of("NoCommit"), place="tmpfs", code=1,
    ),
    Case(
        "revoked key", "the token server and the bucket reject the job's key", revoke,
        "^NO COMMITS  .*credentials", "NO COMMITS: .*credentials", "not saved|aborted.*credentials|credentials",
        alerts=of("CredentialsFailing"), may=of("NoCommit", "SavesAborted"), place="bucket", code=1,
    ),
    Case(
        "damaged step", "one bit of the newest step, and a restart", flip_and_restart,
        r"(?s)^(HEALTHY|SAVING).*quarantined: step \d+", r"step \d+.* quarantined|quarantined", "is quarantined",
        alerts=of("DamageFound", "Quarantined"), flags=("--hang_after_s=0", "--max_restarts=3"), look_s=60,
    ),
    Case(
        "job gone", "SIGKILL to the launcher and all hosts", kill_all,
        "^STALLED  the job is gone", r"BAD\s+hosts\s+STALLED: the job is gone", "The job is gone", alerts=of("JobGone"),
        may=of("NoCommit", "HostSilent"), look_s=75, code=1,
    ),
)  # fmt: skip

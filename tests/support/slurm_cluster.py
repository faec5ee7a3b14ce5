"""A real Slurm of four nodes on this machine: munged, slurmctld and four slurmd, for one test session.

Needs root and Debian's `slurm-wlm` and `munge`. The nodes' names are known only in a mount namespace of the cluster's
own (a copy of /etc/hosts), so nothing of the machine changes. The keeper, who holds the namespace, ends the daemons
when this process closes its standard input, or dies.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter")
NODES = ("n1", "n2", "n3", "n4")
START_S = 30.0
COMMAND_S = 60.0

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again only when its old credentials have expired: two minutes unless said here.
AuthInfo=socket={at}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={at}/slurmctld.pid
SlurmctldLogFile={at}/log/slurmctld.log
SlurmdPidFile={at}/slurmd.%n.pid
SlurmdLogFile={at}/log/slurmd.%n.log
SlurmdSpoolDir={at}/spool.%n
StateSaveLocation={at}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=10
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=spot Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

KEEPER = """\
mount --bind "$1/hosts" /etc/hosts || exit 1
echo there
cat >/dev/null
for pid in "$1"/slurmctld.pid "$1"/slurmd.*.pid "$1"/munged.pid; do kill "$(cat "$pid" 2>/dev/null)" 2>/dev/null; done
"""


def why_not() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}; `make test-slurm` installs Debian's slurm-wlm and munge"
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        return "this machine gives no mount namespace"
    return None


def eventually(holds: Callable[[], bool], what: str, deadline_s: float) -> None:
    give_up = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < give_up, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.2)


class Cluster:
    """Four nodes, `n1` to `n4`, and the partitions `spot` (preemptible) and `urgent` (which preempts it)."""

    def __init__(self, at: Path, environ: Mapping[str, str]) -> None:
        self._at = at
        for name in ("log", "state", *(f"spool.{node}" for node in NODES)):
            (at / name).mkdir(parents=True)
        hosts = Path("/etc/hosts").read_text()
        (at / "hosts").write_text(f"{hosts}\n127.0.0.1 {socket.gethostname()} {' '.join(NODES)}\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = min(int(probe.getsockname()[1]), 60000)
        host = socket.gethostname().partition(".")[0]
        (at / "slurm.conf").write_text(CONF.format(at=at, host=host, port=port, first=port + 1, last=port + 4))
        self._environ = {**environ, "SLURM_CONF": str(at / "slurm.conf")}
        self._keeper = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", KEEPER, "keeper", str(at)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> None:
        assert self._keeper.stdout is not None and self._keeper.stdout.readline() == "there\n"
        key = self._at / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        self.run("munged", "--force", *(f"--{option}={self._at / name}" for option, name in files.items()))
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        eventually(lambda: set(self.nodes().values()) == {"idle"}, "four idle nodes", START_S)

    def close(self) -> None:
        for node in NODES:
            self._kill_tasks(node)
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(timeout=COMMAND_S)

    def run(self, *command: str, cwd: Path | None = None, code: int = 0, deadline_s: float = COMMAND_S) -> str:
        """Standard output of a command that sees the cluster."""
        inside = ["nsenter", "-t", str(self._keeper.pid), "-m", f"--wd={cwd or self._at}"]
        done = subprocess.run(
            [*inside, *command],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )
        assert done.returncode == code, f"{command[0]}: {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """State of each node: idle, allocated, down*, ..."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-p", "spot", "-o", "%N %T").splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: `JobState`, `Restarts`, `ExitCode`, `NumNodes`, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", number).split(" ")
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def lose_node(self, node: str) -> None:
        """As if its power had gone: its daemon and all that it runs are killed, and nobody is told."""
        os.kill(int((self._at / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        self._kill_tasks(node)

    def _kill_tasks(self, node: str) -> None:
        """Kill what the node runs. A step's daemon does not say in its environment whose it is; its children do."""
        mine = f"SLURMD_NODENAME={node}".encode()
        ours = f"SLURM_CONF={self._at / 'slurm.conf'}".encode()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                if mine not in variables or ours not in variables:
                    continue
                pid = int(entry.name)
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd"):
                    os.kill(parent, signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)

"""`orchestrator launch tpu-vm`: runs a job on Cloud TPU VMs through gcloud. Without --run it only prints the commands.

The commands are lists of words made by pure functions. `run` carries them out: it waits for the machines, starts the
program on every worker, and starts it again by the rules of `launch.supervise`. What ssh ends with says little, so
every worker prints its program's exit code. Machines that are gone when a job has failed were preempted: with --create
they are made again, and that costs nothing of --max_restarts.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from absl import flags

from launch import command, contract, supervise
from launch.command import LaunchError

HELP = """\
usage: orchestrator launch tpu-vm --name NAME --zone ZONE [flags] -- PROGRAM [ARGUMENT...]

Prints the gcloud commands that run PROGRAM on every worker of a TPU slice, or of several; --run carries them out, and
starts the job again when it was preempted or has failed. --create makes a queued resource first; without it the
machines are there already.

examples:
  orchestrator launch tpu-vm --name run7 --zone us-east5-a --create --type v6e-16 -- python train.py
  orchestrator launch tpu-vm --name run7 --zone us-east5-a --image IMAGE --run -- python train.py
"""

FLAGS = flags.FlagValues()
flags.DEFINE_string("name", None, "of the TPU and of its queued resource", flag_values=FLAGS)
flags.DEFINE_string("zone", None, "Google Cloud zone", flag_values=FLAGS)
flags.DEFINE_string("project", None, "Google Cloud project; gcloud's own if unset", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "TPU slices, joined over the data center network", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("create", False, "make a queued resource first, and again when it was preempted", flag_values=FLAGS)
flags.DEFINE_string("type", None, "accelerator type to create: v6e-16", flag_values=FLAGS)
flags.DEFINE_string("runtime_version", "v2-alpha-tpuv6e", "software of the machines to create", flag_values=FLAGS)
flags.DEFINE_bool("spot", False, "create spot machines", flag_values=FLAGS)
flags.DEFINE_string("service_account", None, "Google service account of the machines to create", flag_values=FLAGS)
flags.DEFINE_string("directory", "~", "where the program runs on each worker", flag_values=FLAGS)
flags.DEFINE_string("image", None, "run it in this container image (docker/Dockerfile)", flag_values=FLAGS)
flags.DEFINE_float("grace_s", 60.0, "seconds for a last save after SIGTERM", lower_bound=1.0, flag_values=FLAGS)
flags.DEFINE_integer("max_restarts", 3, "restarts after failures; preemptions are free", flag_values=FLAGS)
flags.DEFINE_float("wait_s", 3600.0, "how long to wait for the machines", lower_bound=0.0, flag_values=FLAGS)
command.define_environment_flags(FLAGS)
flags.DEFINE_bool("run", False, "carry the commands out instead of printing them", flag_values=FLAGS)

READY = "ACTIVE"
COMMAND_S = 300.0
END_S = 300.0  # JAX ends the survivors of a lost process after 100 s
POLL_S = 10.0
LONGEST_LINE = 64 * 1024
# Answers that say that the machines are no more; no answer, and any other, says nothing of the kind.
GONE = frozenset({"SUSPENDING", "SUSPENDED", "FAILED", "DELETING"})


@dataclass(frozen=True)
class TpuJob:
    """What to run, and on what. `accelerator` None: the machines are there. `wait_s`: for the machines to be ready."""

    name: str
    zone: str
    program: Sequence[str]
    slices: int = 1
    project: str | None = None
    accelerator: str | None = None
    runtime_version: str = "v2-alpha-tpuv6e"
    spot: bool = False
    service_account: str | None = None
    directory: str = "~"
    image: str | None = None
    grace_s: float = 60.0
    wait_s: float = 3600.0
    poll_s: float = POLL_S
    environ: Mapping[str, str] = field(default_factory=dict)
    policy: supervise.RestartPolicy = field(default_factory=supervise.RestartPolicy)

    def validate(self) -> None:
        """Raises: LaunchError with one line, if no commands can be made of this."""
        command.needs_program(self.program, "tpu-vm --name run --zone ZONE")
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,58}[a-z0-9])?", self.name):
            raise LaunchError(f"--name={self.name}: expected at most 60 of a-z, 0-9 and -, beginning with a letter")
        if not re.fullmatch(r"[\w./~-]+", self.directory):
            raise LaunchError(f"--directory={self.directory}: expected a path of letters, digits and '._-/'")

    @property
    def nodes(self) -> list[str]:
        """Names of the slices, as a queued resource names its nodes."""
        return [self.name] if self.slices == 1 else [f"{self.name}-{index}" for index in range(self.slices)]


def _gcloud(job: TpuJob, *words: str) -> list[str]:
    where = [f"--zone={job.zone}", *([] if job.project is None else [f"--project={job.project}"])]
    return ["gcloud", "compute", "tpus", *words, *where]


def create(job: TpuJob) -> list[str]:
    """Ask for the machines; they come when there are some."""
    assert job.accelerator is not None
    nodes = [f"--node-id={job.name}"]
    if job.slices > 1:
        nodes = [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    options = [f"--accelerator-type={job.accelerator}", f"--runtime-version={job.runtime_version}", *nodes]
    options += ["--spot"] if job.spot else []
    options += [] if job.service_account is None else [f"--service-account={job.service_account}"]
    return _gcloud(job, "queued-resources", "create", job.name, *options)


def describe(job: TpuJob) -> list[str]:
    return _gcloud(job, "queued-resources", "describe", job.name, "--format=value(state.state)")


def delete(job: TpuJob) -> list[str]:
    """Also what is left of preempted machines: their name can be used again only then."""
    return _gcloud(job, "queued-resources", "delete", job.name, "--force", "--quiet")


def _on_all_workers(job: TpuJob, node: str, remote: str) -> list[str]:
    return _gcloud(job, "tpu-vm", "ssh", node, "--worker=all", f"--command={remote}")


def _lock(job: TpuJob) -> str:
    """On each worker, in shell: in the user's home, where nobody else can put a link or hold it; the machine's name is
    part of it as homes may be shared."""
    return f'"$HOME/.orchestrator-{job.name}-$(uname -n).lock"'


def ended(token: str) -> re.Pattern[str]:
    """What a worker of this start says when its program has ended. `token` is of one start: the program may print
    anything, the words of another launcher among it."""
    return re.compile(rf"launch{re.escape(token)}: the program ended with (\d{{1,3}})\b")


def start(job: TpuJob, node: str, restart: int, token: str = "") -> list[str]:
    """The program on every worker of one slice. It waits there for a process of an earlier start to leave."""
    variables = {
        contract.RESTART_COUNT: str(restart),
        contract.GRACE_PERIOD_S: f"{job.grace_s:g}",
        "PYTHONUNBUFFERED": "1",
        **job.environ,
    }
    wait_s = int(job.grace_s + contract.LEAVING_S)
    if job.image is None:
        words = ["env", *(f"{name}={value}" for name, value in variables.items()), *job.program]
    else:
        words = ["sudo", "docker", "run", "--rm", "--init", f"--name={job.name}", "--network=host", "--privileged"]
        words += [
            "--user=root",
            "--volume=/dev/shm:/dev/shm",  # a container's own has 64 MiB, and its memory tier would go with it
            f"--stop-timeout={wait_s}",
            *(f"--env={name}={value}" for name, value in variables.items()),
        ]
        words += [job.image, *job.program]
    remote = [
        "trap : TERM",  # `stop` signals all that hold the lock; this shell has still to say how the program ended
        f"exec 9>{_lock(job)}",
        f"cd -- {job.directory} && flock --timeout {wait_s} 9 && {shlex.join(words)}",
        f'code=$?; echo "launch{token}: the program ended with $code"; exit $code',
    ]
    return _on_all_workers(job, node, "; ".join(remote))


def stop(job: TpuJob, node: str) -> list[str]:
    """SIGTERM for the program on every worker: it saves and leaves."""
    if job.image is not None:
        return _on_all_workers(job, node, shlex.join(["sudo", "docker", "kill", "--signal=TERM", job.name]))
    return _on_all_workers(job, node, f"fuser -k -TERM {_lock(job)}")


def plan(job: TpuJob) -> str:
    """All commands, as a page to read or to copy from."""
    lines = []
    if job.accelerator is not None:
        lines += ["# Ask for the machines, and wait until this prints ACTIVE:", shlex.join(create(job))]
        lines += [shlex.join(describe(job)), ""]
    many = "; one command for each slice, at the same time" if job.slices > 1 else ""
    lines += [f"# Start the job{many}. Again, with one restart more, when it ends with 75 or has failed:"]
    lines += [shlex.join(start(job, node, 0)) for node in job.nodes]
    lines += ["", "# Stop it: every process saves the same step and leaves:"]
    lines += [shlex.join(stop(job, node)) for node in job.nodes]
    if job.accelerator is not None:
        lines += ["", "# Give the machines back, or what a preemption has left of them before asking again:"]
        lines += [shlex.join(delete(job))]
    return "\n".join(lines) + "\n"


def _answer(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=COMMAND_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{shlex.join(words)}: no answer in {COMMAND_S:g} s") from error


def _must(words: Sequence[str]) -> None:
    done = _answer(words)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise LaunchError(f"{shlex.join(words[:5])}: {last}")


def _note(text: str) -> None:
    command.complain(f"[launch] {text}")


class _Session:
    """One start of the job: an ssh for each slice, each read by a thread of its own until it ends."""

    def __init__(self, job: TpuJob, restart: int) -> None:
        self._codes: list[list[int]] = [[] for _ in job.nodes]
        token = f"-{secrets.token_hex(8)}"
        self._ended = ended(token)
        self.ssh = [
            subprocess.Popen(
                start(job, node, restart, token),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",  # a reader that stops would stop the job
                start_new_session=True,  # a terminal's Ctrl-C is for us, who stop the workers first, so that they save
            )
            for node in job.nodes
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(index, node), daemon=True) for index, node in enumerate(job.nodes)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, index: int, node: str) -> None:
        output = self.ssh[index].stdout
        assert output is not None
        while line := output.readline(LONGEST_LINE):
            with contextlib.suppress(OSError):  # whoever read our output has gone; the job need not
                print(f"[{node}] {line}", end="" if line.endswith("\n") else "\n", flush=True)
            if found := self._ended.search(line):
                self._codes[index].append(int(found[1]))

    def running(self) -> bool:
        return any(ssh.poll() is None for ssh in self.ssh)

    def exits(self) -> list[supervise.Exit]:
        """How each slice ended: by its workers' own word, and by ssh's where one has none. Silence is no success."""
        found = []
        for index, (ssh, reader) in enumerate(zip(self.ssh, self._readers, strict=True)):
            code = ssh.wait()
            reader.join(timeout=COMMAND_S)
            ended = [supervise.Exit(index, one) for one in self._codes[index]]
            failed = supervise.first_cause(ended)
            if failed is not None:
                found.append(failed)
            elif contract.EXIT_PREEMPTED in self._codes[index]:
                found.append(supervise.Exit(index, contract.EXIT_PREEMPTED))
            else:
                found.append(supervise.Exit(index, code if ended else code or 1))
        return found

    def close(self) -> None:
        for ssh in self.ssh:
            ssh.kill()
            ssh.wait()


@contextmanager
def _operator() -> Iterator[list[int]]:
    """The operator's SIGTERM and Ctrl-C, collected instead of ending us."""
    received: list[int] = []

    def handler(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def _wait_for_machines(job: TpuJob, received: Sequence[int]) -> None:
    """Until the queued resource is ready. Raises: LaunchError if it is not in time, or the operator stops us."""
    give_up = time.monotonic() + job.wait_s
    while (state := _answer(describe(job)).stdout.strip()) != READY:
        if received or time.monotonic() >= give_up:
            why = "stopped" if received else f"after {job.wait_s:g} s"
            raise LaunchError(f"{job.name}: {why} the machines are {state or 'unknown'}, expected {READY}")
        time.sleep(job.poll_s)


def _gone(job: TpuJob) -> bool:
    """Whether Google says so, in words: what is left of them is deleted then."""
    return job.accelerator is not None and _answer(describe(job)).stdout.strip() in GONE


def _watch(job: TpuJob, session: _Session, received: Sequence[int]) -> list[supervise.Exit]:
    """Wait for the end of every slice, passing the operator's signal on once; a second one ends the sessions. Once one
    slice has ended the others get END_S."""
    stopping, give_up = False, float("inf")
    while session.running():
        time.sleep(0.1)
        if any(ssh.poll() is not None for ssh in session.ssh):
            give_up = min(give_up, time.monotonic() + END_S)
        if received and not stopping:
            stopping, give_up = True, time.monotonic() + job.grace_s + contract.LEAVING_S
            _note(f"{supervise.signal_name(received[0])} received: telling the workers to save and leave")
            for node in job.nodes:
                _answer(stop(job, node))
        if len(received) > 1 or time.monotonic() >= give_up:
            session.close()
    return session.exits()


def run(job: TpuJob) -> int:
    """Run the job to its end, restarts included, and return its exit code. Main thread.

    Raises: LaunchError if the machines cannot be had, or gcloud rejects.
    """
    job.validate()
    if shutil.which("gcloud") is None:
        raise LaunchError("gcloud: no such program; without --run the commands are printed, to be run elsewhere")
    history = supervise.JobHistory(hosts=job.slices)
    with _operator() as received:
        if job.accelerator is not None and _answer(describe(job)).returncode:
            _must(create(job))
        while True:
            if job.accelerator is not None:
                _wait_for_machines(job, received)
            session = _Session(job, history.restarts)
            try:
                exits = _watch(job, session, received)
            finally:
                session.close()
            state = supervise.State(job.policy, frozenset(range(job.slices)), history)
            if received:
                state = replace(state, stop_signal=received[0])
            if any(exit_.failed for exit_ in exits) and not received and _gone(job):
                _note("the machines are gone: preempted")
                exits = [supervise.Exit(exit_.index, contract.EXIT_PREEMPTED) for exit_ in exits]
                _answer(delete(job))
                _must(create(job))
            end = supervise.on_exits(state, exits)[1][0]
            if isinstance(end, supervise.Finish):
                return end.code
            assert isinstance(end, supervise.Restart)
            history = end.history
            _note(
                f"restart {history.restarts} in {history.delay_s:g} s: {', '.join(history.notices) or 'it has failed'}"
            )
            resume_at = time.monotonic() + history.delay_s
            while not received and time.monotonic() < resume_at:
                time.sleep(0.1)
            if received:
                return supervise.stopped_between(history).code


def _body(values: dict[str, Any], program: list[str]) -> int:
    for name in ("name", "zone"):
        if not values[name]:
            raise LaunchError(f"--{name} is required")
    if values["create"] and not values["type"]:
        raise LaunchError("--create needs --type, the accelerator type: v6e-16")
    environ = command.environment_of(values)
    same = ["name", "zone", "project", "slices", "runtime_version", "spot", "service_account", "directory", "image"]
    same += ["grace_s", "wait_s"]
    job = TpuJob(
        program=program,
        accelerator=values["type"] if values["create"] else None,
        environ=environ,
        policy=supervise.RestartPolicy(max_restarts=values["max_restarts"]),
        **{name: values[name] for name in same},
    )
    job.validate()
    if values["run"]:
        return run(job)
    print(plan(job), end="")
    return 0


def main(arguments: Sequence[str]) -> int:
    return command.run("tpu-vm", HELP, FLAGS, arguments, _body)

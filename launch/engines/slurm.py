"""Runs a job under Slurm: an sbatch script with one process a node, which requeues itself when it was preempted.

Slurm is the supervisor. A preemption, or the end of the time limit coming near, reaches the processes as SIGTERM; they
save, leave with 75, and the script asks for the job to be queued again. A node that is lost makes Slurm requeue the job
by itself, and with `min_nodes` it comes back on as many nodes as there are. Any other failure ends the job with its
code. `script` is pure.

Memory tiers (`tiers`) are in each node's /dev/shm, in a directory of the job: they outlast a requeue, and are removed
when the job is over. What Slurm leaves no time for is removed by the user's next job on that node.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, contract
from launch.command import LaunchError
from launch.supervise import FINAL_CODES
from orchestrator.texts import printable

SUBMIT_S = 60.0
NODE_ANSWERS_S = 60
NODE_LOST_S = 900  # Slurm's own SlurmdTimeout, 300 s unless the site chose another, and room
# A step inherits neither a range of nodes nor one task on each.
NODES = ("srun", '--nodes="$SLURM_JOB_NUM_NODES"', '--ntasks="$SLURM_JOB_NUM_NODES"', "--ntasks-per-node=1")
TIDY_S = 60
TIERS = "orchestrator-slurm"

HELP = """\
usage: orchestrator launch slurm --nodes N [flags] -- PROGRAM [ARGUMENT...]

Prints an sbatch script that runs PROGRAM once on each node, or submits it (--submit). A process that leaves with 75
(preempted: saved, and to be started again) sends the job back into the queue; so does a lost node. 0 is done, anything
else failed. --min_nodes lets the job resume on fewer nodes than --nodes.

examples:
  orchestrator launch slurm --nodes 4 --gpus_per_node 8 --time 04:00:00 --submit -- python train.py
  orchestrator launch slurm --nodes 4 --min_nodes 2 --partition spot -- python train.py > job.sbatch
"""

FLAGS = flags.FlagValues()
flags.DEFINE_integer("nodes", None, "machines, one process each", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("min_nodes", None, "start on so few if there are no more", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("gpus_per_node", None, "GPUs of each node", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("cpus_per_node", None, "CPU cores for each process", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("mem", None, "memory of each node, as Slurm writes it: 200G", flag_values=FLAGS)
flags.DEFINE_string("time", None, "time limit: hours:minutes:seconds, or days-hours", flag_values=FLAGS)
flags.DEFINE_string("partition", None, "Slurm partition", flag_values=FLAGS)
flags.DEFINE_string("account", None, "Slurm account", flag_values=FLAGS)
flags.DEFINE_string("qos", None, "Slurm quality of service", flag_values=FLAGS)
flags.DEFINE_multi_string("sbatch", [], "one more sbatch option, as --sbatch=--constraint=h100", flag_values=FLAGS)
flags.DEFINE_string("job_name", "train", "the job's name in the queue", flag_values=FLAGS)
flags.DEFINE_string("log_dir", "logs", "output, in DIR/JOB/restart-R/host-I.log", flag_values=FLAGS)
flags.DEFINE_float("grace_s", 120.0, "seconds for a last save after SIGTERM", lower_bound=1.0, flag_values=FLAGS)
flags.DEFINE_float(
    "end_grace_s", 30.0, "seconds the others get when one process has ended", lower_bound=1.0, flag_values=FLAGS
)
flags.DEFINE_integer("max_requeues", 100, "preemptions after which the job ends", lower_bound=0, flag_values=FLAGS)
command.define_environment_flags(FLAGS)
flags.DEFINE_integer("devices_per_process", None, "simulate CPU devices", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("tiers", False, "memory tiers that outlast a requeue (docs/tiers.md)", flag_values=FLAGS)
flags.DEFINE_bool("submit", False, "hand the script to sbatch and print the job's id", flag_values=FLAGS)


@dataclass(frozen=True)
class SlurmJob:
    """What to run. `options` are sbatch's, without the leading dashes; `grace_s` is for the last save, to which
    contract.LEAVING_S is added before Slurm kills."""

    program: Sequence[str]
    nodes: int
    min_nodes: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    cpus_per_node: int | None = None
    log_dir: str = "logs"
    grace_s: float = 120.0
    end_grace_s: float = 30.0
    max_requeues: int = 100
    environ: Mapping[str, str] = field(default_factory=dict)
    tiers: bool = False

    def validate(self) -> None:
        """Raises: LaunchError with one line, if no script can be made of this."""
        command.needs_program(self.program, "slurm --nodes 4")
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise LaunchError(f"--min_nodes={self.min_nodes}: expected at most --nodes={self.nodes}")
        for name, value in self.options.items():
            # A newline would begin a line of the script's own; sbatch ends an option at a blank or a `#`.
            if not re.fullmatch(r"[a-z][a-z-]*", name) or not re.fullmatch(r"[^\s#\"'\\]*", value):
                raise LaunchError(f"--{name}={value}: not an option that a script can hold; no blanks, quotes or #")
        if not re.fullmatch(r"[^\s#\"'\\%]+", self.log_dir):
            raise LaunchError(f"--log_dir={self.log_dir}: expected a path without blanks, quotes, # or %")


def script(job: SlurmJob) -> str:
    """The sbatch script. Raises: LaunchError if the job cannot be written as one."""
    job.validate()
    lines = [
        "#!/bin/bash",
        "# Written by `orchestrator launch slurm`; sbatch it from the directory where the program is to run.",
        *(f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in _options(job).items()),
        "",
        "restart=${SLURM_RESTART_COUNT:-0}",
        f'logs={shlex.quote(job.log_dir)}/"$SLURM_JOB_ID/restart-$restart"',
        'mkdir -p -- "$logs"',
        f'export {contract.RESTART_COUNT}="$restart"',
        *(f"export {name}={shlex.quote(value)}" for name, value in _variables(job).items()),
        *(_TIERS if job.tiers else _NO_TIERS),
        "# A signal to the whole job must not end the shell that decides what comes afterwards.",
        "trap : TERM",
        "",
        " \\\n  ".join([*_srun(job), shlex.join(job.program)]),
        "code=$?",
        *_UNLESS_PREEMPTED,
        "",
        *_requeue(job.max_requeues),
        "",
    ]
    return "\n".join(lines)


def _options(job: SlurmJob) -> dict[str, str]:
    """sbatch's options; '' is one without a value. The job's own come last and win, but for its number of cores."""
    least = job.nodes if job.min_nodes is None else job.min_nodes
    options = {
        "nodes": str(job.nodes) if least == job.nodes else f"{least}-{job.nodes}",
        # Whole nodes, and no number of tasks: with one, Slurm stops at the least number of nodes that holds them.
        "exclusive": "",
        "requeue": "",
        "open-mode": "append",
        "signal": f"TERM@{int(job.grace_s + contract.LEAVING_S)}",
        "output": f"{job.log_dir}/slurm-%j.log",
        **job.options,
    }
    if job.cpus_per_node is not None:
        options["cpus-per-task"] = str(job.cpus_per_node)
    return options


def _variables(job: SlurmJob) -> dict[str, str]:
    return {"PYTHONUNBUFFERED": "1", contract.GRACE_PERIOD_S: f"{job.grace_s:g}", **job.environ}


def _srun(job: SlurmJob) -> list[str]:
    return [
        *NODES,
        *(() if job.cpus_per_node is None else (f"--cpus-per-task={job.cpus_per_node}",)),
        # The bound on the others once one process has ended, however it ended: they leave together, or not at all.
        f"--wait={int(job.end_grace_s)}",
        '--output="$logs/host-%t.log"',
        "--open-mode=append",
    ]


_NO_TIERS = ('over() { exit "$code"; }',)
_TIERS = (
    f'tiers="${{{contract.TIER_DIR}:-/dev/shm}}/{TIERS}-$(id -u)"',
    f'export {contract.TIER_DIR}="$tiers-$SLURM_JOB_ID"',
    "# In the processes' environment only: neither ps nor scontrol shows it.",
    f"{contract.TIER_SECRET}=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')",
    f"export {contract.TIER_SECRET}",
    "# On each node: what jobs that are over have left goes, and this job's directory is there.",
    """queued=" $(squeue --me --array --noheader --format=%A | tr '\\n' ' ')\"""",
    f"{' '.join(NODES)} --quiet bash -c '",
    '  case "$2" in *" $SLURM_JOB_ID "*)',
    '    for dir in "$1"-*; do',
    '      case "$2" in *" ${dir##*-} "*) ;; *) rm -rf -- "$dir" ;; esac',
    "    done ;;",
    "  esac",
    f"""  mkdir -p -m 700 -- "${contract.TIER_DIR}"' tiers "$tiers" "$queued\"""",
    "# What the nodes lack comes while JAX starts.",
    f'if [ "$restart" -gt 0 ] && [ -n "${{{contract.RUN_ROOT}:-}}" ]; then',
    f'  {" ".join(NODES)} --overlap --output="$logs/prefetch-%t.log" \\',
    f'    orchestrator prefetch "${contract.RUN_ROOT}" --json &',
    "fi",
    "over() {",
    f'  timeout {TIDY_S} {" ".join(NODES)} --overlap --quiet rm -rf -- "${contract.TIER_DIR}"',
    '  exit "$code"',
    "}",
)

_UNLESS_PREEMPTED = (
    f'if [ "$code" -ne {contract.EXIT_PREEMPTED} ]; then',
    f'  case "$code" in {"|".join(map(str, (0, *sorted(FINAL_CODES))))}) over ;; esac',
    "  # A process that fails and a node that is lost look alike from here, but the lost node does not answer.",
    f"  if ! timeout {NODE_ANSWERS_S} {' '.join(NODES)} --overlap --quiet true; then",
    f'    echo "code $code, and a node does not answer: waiting {NODE_LOST_S} s for Slurm to requeue the job"',
    f'    sleep {NODE_LOST_S} || exit "$code" # Slurm ends this shell',
    "  fi",
    "  over",
    "fi",
)


def _requeue(max_requeues: int) -> list[str]:
    return [
        "# Preempted: saved, and to be started again. Not so if somebody has cancelled the job meanwhile.",
        "# The first word of that name: directories and comments, which may say anything, come after it.",
        'state=$(scontrol show job --oneliner "$SLURM_JOB_ID")',
        "state=${state#* JobState=}",
        'case "${state%% *}" in',
        "  RUNNING) ;;",
        '  *) echo "preempted, but no longer running: not requeued"; over ;;',
        "esac",
        f'if [ "$restart" -ge {max_requeues} ]; then',
        f'  echo "preempted, but requeued {max_requeues} times already: not requeued"; over',
        "fi",
        'echo "preempted: the job has saved and goes back into the queue"',
        'scontrol requeue "$SLURM_JOB_ID" || exit "$code"',
        "sleep 60 # Slurm ends this shell",
    ]


def submit(text: str, log_dir: str) -> int:
    """Hand the script to sbatch and print the job's id. Returns sbatch's exit code. Raises: LaunchError."""
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch: no such program; without --submit the script is printed, to be submitted elsewhere")
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)  # Slurm loses the output if the directory is not there
    except OSError as error:
        raise LaunchError(f"--log_dir={log_dir}: {error.strerror}") from error
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SUBMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"sbatch: no answer in {SUBMIT_S:g} s; see squeue before trying again") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        command.complain(f"launch slurm: {last}")
        return 1
    print(printable(done.stdout.strip()))
    return 0


def _body(values: dict[str, Any], program: list[str]) -> int:
    if values["nodes"] is None:
        raise LaunchError("--nodes is required: how many machines to run on")
    options = {"job-name": values["job_name"]}
    for flag, name in (
        ("partition", "partition"),
        ("account", "account"),
        ("qos", "qos"),
        ("time", "time"),
        ("mem", "mem"),
        ("gpus_per_node", "gpus-per-node"),
    ):
        if values[flag] is not None:
            options[name] = str(values[flag])
    for more in values["sbatch"]:
        if not more.startswith("--"):
            raise LaunchError(f"--sbatch={more}: expected a long option, as --sbatch=--constraint=h100")
        name, _, value = more[2:].partition("=")
        options[name] = value
    environ = command.environment_of(values)
    if values["devices_per_process"] is not None:
        environ[contract.LOCAL_DEVICES] = str(values["devices_per_process"])
    text = script(
        SlurmJob(
            program=program,
            nodes=values["nodes"],
            min_nodes=values["min_nodes"],
            options=options,
            cpus_per_node=values["cpus_per_node"],
            log_dir=values["log_dir"],
            grace_s=values["grace_s"],
            end_grace_s=values["end_grace_s"],
            max_requeues=values["max_requeues"],
            environ=environ,
            tiers=values["tiers"],
        )
    )
    if values["submit"]:
        return submit(text, values["log_dir"])
    print(text, end="")
    return 0


def main(arguments: Sequence[str]) -> int:
    return command.run("slurm", HELP, FLAGS, arguments, _body)

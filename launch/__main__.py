"""`orchestrator launch COMMAND`, or `python -m launch COMMAND`: starts jobs. Each command reads its own
flags; everything after `--` is the job's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from launch import command, programs
from launch.command import EXIT_USAGE, LaunchError
from launch.engines import gke, local, slurm, tpu_vm
from launch.supervise import RestartPolicy
from launch.tiers import TierOptions
from orchestrator import failpoints
from orchestrator.cli.usage import choose_from
from orchestrator.environment import FAILPOINTS
from orchestrator.errors import UsageError

LOCAL_HELP = """\
usage: orchestrator launch local --processes N [flags] -- PROGRAM [ARGUMENT...]

Starts N JAX processes on this machine, puts each one's name before its output, and ends with the job's exit code
(128 + signal for a signal). When one process fails or hangs the others are ended; --max_restarts starts the job again,
except after wrong usage (2), damage (4), being fenced (5) and nothing left to restore (6). A job that leaves preempted
(75) resumes without using up a restart. SIGTERM and Ctrl-C go to every host's own process, not to its data workers; a
second one kills them all. A closed terminal stops the job as SIGTERM does, unless nohup started it. Nobody need read
the output.

examples:
  orchestrator launch local --processes 4 --devices_per_process 2 -- orchestrator launch train --root=/tmp/run
  orchestrator launch local --processes 2 --max_restarts 3 --log_dir /tmp/logs -- python train.py
  orchestrator launch local --processes 4 --tiers --domains 2 --lose_tier_on_kill --max_restarts 1 -- python train.py
"""

# Flags of its own, not absl's global set: there `log_dir` means something else, and the job's flags are not ours.
FLAGS = flags.FlagValues()
flags.DEFINE_integer("processes", None, "simulated hosts, one process each", flag_values=FLAGS)
flags.DEFINE_integer("devices_per_process", 1, "CPU devices of each process", flag_values=FLAGS)
flags.DEFINE_integer("max_restarts", 0, "start the job again this many times after a failure", flag_values=FLAGS)
flags.DEFINE_integer("processes_after_restart", None, "hosts after a restart; as before if unset", flag_values=FLAGS)
command.define_environment_flags(FLAGS)
flags.DEFINE_string(
    "log_dir",
    None,
    "also write output to DIR/restart-R/host-I.log (a second run: DIR/run-2/...)",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "stop_grace_s", 60.0, "seconds from SIGTERM or Ctrl-C to SIGKILL", lower_bound=0.0, flag_values=FLAGS
)
flags.DEFINE_float(
    "hang_after_s",
    900.0,
    "a host whose agent is silent for so long is killed and the job restarted; 0: never",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_float("backoff_s", 0.5, "pause before a restart; doubled while there is no progress", flag_values=FLAGS)
flags.DEFINE_integer(
    "step_back_after", 3, "after so many deaths at one step, resume from a step earlier", flag_values=FLAGS
)
flags.DEFINE_string("elastic", None, "MIN:MAX hosts; a lost host is left out of the next start", flag_values=FLAGS)
flags.DEFINE_string("hosts_file", None, "elastic: the hosts that are there, one a line", flag_values=FLAGS)
flags.DEFINE_string("chaos", None, "failpoints for the job, as PLACE=ACTION@process=I@restart=0;...", flag_values=FLAGS)
flags.DEFINE_float(
    "end_grace_s", 5.0, "seconds the others get when one process has failed", lower_bound=0.0, flag_values=FLAGS
)
flags.DEFINE_bool("tiers", False, "each host has a memory tier of its own (docs/tiers.md)", flag_values=FLAGS)
flags.DEFINE_bool(
    "lose_tier_on_kill", False, "a host that is killed loses its tier, as its machine would", flag_values=FLAGS
)
flags.DEFINE_integer("domains", None, "spread the hosts evenly over so many failure domains", flag_values=FLAGS)
flags.DEFINE_bool("keep_tiers", False, "leave the tiers when the job is over", flag_values=FLAGS)
flags.DEFINE_string("tier_dir", None, "where the tiers are, and stay; in /dev/shm if unset", flag_values=FLAGS)


def _job(values: dict[str, Any], program: list[str]) -> local.LocalJob:
    """Raises: LaunchError with one line for whatever cannot be used."""
    if values["processes"] is None:
        raise LaunchError("--processes is required: how many hosts to simulate")
    return local.LocalJob(
        command=program,
        processes=values["processes"],
        devices_per_process=values["devices_per_process"],
        processes_after_restart=values["processes_after_restart"],
        hosts_file=None if values["hosts_file"] is None else Path(values["hosts_file"]),
        environ=_chaos(values["chaos"]) | command.environment_of(values),
        log_dir=None if values["log_dir"] is None else Path(values["log_dir"]),
        tiers=_tiers(values),
        policy=RestartPolicy(
            max_restarts=values["max_restarts"],
            stop_grace_s=values["stop_grace_s"],
            end_grace_s=values["end_grace_s"],
            hang_after_s=values["hang_after_s"],
            backoff_s=values["backoff_s"],
            step_back_after=values["step_back_after"],
            elastic=_elastic(values["elastic"]),
        ),
    )


def _tiers(values: dict[str, Any]) -> TierOptions | None:
    """Whatever is said about tiers asks for them."""
    directory = None if values["tier_dir"] is None else Path(values["tier_dir"])
    keep, lose, domains = values["keep_tiers"], values["lose_tier_on_kill"], values["domains"]
    if not (values["tiers"] or keep or lose or domains is not None or directory is not None):
        return None
    return TierOptions(directory, keep, lose, domains)


def _elastic(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    least, _, most = text.partition(":")
    if not (least.isdigit() and most.isdigit()):
        raise LaunchError(f"--elastic={text}: expected MIN:MAX, two numbers of hosts")
    return int(least), int(most)


def _chaos(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    try:
        failpoints.parse(text)
    except UsageError as error:
        raise LaunchError(f"--chaos: {error}") from error
    return {FAILPOINTS: text}


def _local(arguments: Sequence[str]) -> int:
    def body(values: dict[str, Any], program: list[str]) -> int:
        return local.run_on_console(_job(values, program))

    return command.run("local", LOCAL_HELP, FLAGS, arguments, body)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "local": (_local, "N simulated hosts on this machine, each with M CPU devices"),
    "slurm": (slurm.main, "an sbatch script, printed or submitted"),
    "gke": (gke.main, "manifests for GKE: JobSet, or Indexed Job and Service; and their check"),
    "tpu-vm": (tpu_vm.main, "gcloud commands for Cloud TPU VMs, printed or run"),
}


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code: 2 for wrong usage, otherwise the job's."""
    rows = {name: about for name, (_, about) in (COMMANDS | programs.PROGRAMS).items()}
    usage = "usage: orchestrator launch COMMAND ...\n\ncommands (each has --help):\n" + "\n".join(
        f"  {name:<12} {about}" for name, about in rows.items()
    )
    if len(argv) < 2:
        print(usage, file=sys.stderr)
        return EXIT_USAGE
    if argv[1] in ("-h", "-help", "--help", "help"):
        print(usage)
        return 0
    if argv[1] in programs.PROGRAMS:
        return programs.run(argv[1:])
    if argv[1] not in COMMANDS:
        print(f"launch: no command {argv[1]!r}; {choose_from(argv[1], rows)}", file=sys.stderr)
        return EXIT_USAGE
    return COMMANDS[argv[1]][0](argv[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv))

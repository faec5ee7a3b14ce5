"""The sbatch script, run by a real bash with programs of Slurm's names beside it that say what they are told to."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import contract
from launch.command import LaunchError
from launch.engines import slurm
from launch.engines.slurm import SlurmJob
from tests.support.places import METACHARACTERS, NASTY

REPOSITORY = Path(__file__).parents[2]


def options(text: str) -> dict[str, str]:
    words = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def run(tmp_path: Path, text: str, restart: int = 0, **programs: str) -> tuple[int, str, list[str]]:
    """(exit code, output, requeues). `programs`: what `srun`, `scontrol` and `sleep` do, as shell lines."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    requeues = tmp_path / "requeues"
    programs = {"scontrol": "echo 'JobId=7 JobState=RUNNING x=y'", "sleep": ":", **programs}
    programs["scontrol"] = f'[ "$1" = requeue ] && {{ echo "$2" >>{requeues}; exit 0; }}\n{programs["scontrol"]}'
    for name, lines in programs.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{lines}\n")
        (bin_ / name).chmod(0o755)
    environ = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    if restart:
        environ["SLURM_RESTART_COUNT"] = str(restart)
    done = subprocess.run(
        ["bash", "-c", text],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, requeues.read_text().split() if requeues.exists() else []


def test_the_program_reaches_the_nodes_word_for_word_with_its_contract(tmp_path: Path) -> None:
    words = ["python", *METACHARACTERS]
    job = SlurmJob(words, 4, 2, cpus_per_node=8, grace_s=45, environ={"NAME": NASTY}, log_dir="out/logs")
    srun = 'printf "%s\\0" "$@" >words; env -0 >environ'
    code, _, requeues = run(tmp_path, slurm.script(job), restart=2, srun=srun)
    assert (code, requeues) == (0, [])
    told = (tmp_path / "words").read_bytes().decode().split("\0")[:-1]
    assert told[-len(words) :] == words
    assert {"--nodes=3", "--ntasks=3", "--cpus-per-task=8", "--output=out/logs/7/restart-2/host-%t.log"} <= set(told)
    assert (tmp_path / "out/logs/7/restart-2").is_dir()
    environ = dict(
        line.split("=", 1) for line in (tmp_path / "environ").read_bytes().decode().split("\0") if "=" in line
    )
    assert (environ[contract.RESTART_COUNT], environ[contract.GRACE_PERIOD_S], environ["NAME"]) == ("2", "45", NASTY)
    assert len(options(slurm.script(job))) == len(options(slurm.script(SlurmJob(["x"], 4, 2, cpus_per_node=8))))


def test_slurm_is_asked_for_whole_nodes_and_for_time_to_save() -> None:
    told = options(slurm.script(SlurmJob(["x"], 4, 2, options={"partition": "spot"}, grace_s=90)))
    assert (told["nodes"], told["partition"], told["signal"]) == ("2-4", "spot", "TERM@120")
    assert {"requeue", "exclusive"} <= told.keys()
    assert options(slurm.script(SlurmJob(["x"], 4)))["nodes"] == "4"


@pytest.mark.parametrize("code", [0, 1, 2, 4, 5, 6, 137])
def test_only_75_asks_for_another_start(tmp_path: Path, code: int) -> None:
    srun = f'[[ "$*" == *" true" ]] || exit {code}'
    assert run(tmp_path, slurm.script(SlurmJob(["x"], 3)), srun=srun) == (code, "", [])


def test_a_preempted_job_is_requeued_unless_cancelled_or_worn_out(tmp_path: Path) -> None:
    text = slurm.script(SlurmJob(["x"], 3, max_requeues=2))
    for name, restart, state, expected in (
        ("preempted", 1, "RUNNING", ["7"]),
        ("cancelled", 1, "CANCELLED", []),
        ("worn", 2, "RUNNING", []),
        ("elsewhere", 1, "CANCELLED Command=/a JobState=RUNNING b", []),
        ("silent", 1, "' >&2; echo '", []),
    ):
        (at := tmp_path / name).mkdir()
        _, output, requeues = run(at, text, restart, srun="exit 75", scontrol=f"echo 'JobId=7 JobState={state} x=y'")
        assert requeues == expected, output


def test_a_node_that_does_not_answer_leaves_the_decision_to_slurm(tmp_path: Path) -> None:
    srun = '[[ "$*" == *" true" ]] && exit 1; exit 134'
    code, output, requeues = run(tmp_path, slurm.script(SlurmJob(["x"], 3)), srun=srun, sleep='echo "sleep $1"')
    assert (code, requeues) == (134, [])
    assert output.splitlines() == [
        "code 134, and a node does not answer: waiting 900 s for Slurm to requeue the job",
        "sleep 900",
    ]


PLAYED = 'while [[ $1 == --* ]]; do shift; done; "$@"'  # an srun of one node
HOLDS = (
    'echo "$ORCHESTRATOR_TIER_SECRET" >secret; stat -c %a "$ORCHESTRATOR_TIER_DIR"; touch "$ORCHESTRATOR_TIER_DIR/held"'
)


@pytest.mark.parametrize(
    ("code", "sleep", "stays"),
    [
        pytest.param(0, ":", False, id="done"),
        pytest.param(5, ":", False, id="fenced"),
        pytest.param(1, ":", False, id="failed"),
        pytest.param(75, ":", True, id="preempted"),
        pytest.param(134, "exit 143", True, id="a node is lost, and Slurm requeues the job"),
        pytest.param(134, ":", False, id="a node is lost, and Slurm does nothing"),
    ],
)
def test_tiers_outlast_a_requeue_and_not_the_job(tmp_path: Path, code: int, sleep: str, stays: bool) -> None:
    shm = tmp_path / "shm"
    name = f"orchestrator-slurm-{os.getuid()}"
    for left in ("5", "6", "70"):
        (shm / f"{name}-{left}" / "held").mkdir(parents=True)
    (shm / "somebody-else").mkdir()
    job = SlurmJob(
        ["bash", "-c", f"{HOLDS}; exit {code}"], 3, environ={contract.TIER_DIR: str(shm)}, log_dir="logs", tiers=True
    )
    lost = '[[ "$*" == *" true" ]] && exit 1\n' if code == 134 else ""
    done, output, requeues = run(
        tmp_path, slurm.script(job), srun=lost + PLAYED, sleep=sleep, squeue='printf "%s\\n" 6 7 70'
    )
    assert (done, requeues) == ((0, ["7"]) if code == 75 else (code, [])), output
    kept = {f"{name}-6", f"{name}-70", "somebody-else"} | ({f"{name}-7"} if stays else set())
    assert {path.name for path in shm.iterdir()} == kept, "of jobs in the queue, and this one's"
    assert output.splitlines()[0] == "700"
    secret = (tmp_path / "secret").read_text().strip()
    assert len(bytes.fromhex(secret)) == 32 and secret not in output
    assert not any(secret in path.read_text() for path in (tmp_path / "logs").rglob("*") if path.is_file())


def test_a_requeued_job_fetches_beside_its_start(tmp_path: Path) -> None:
    (shm := tmp_path / "shm").mkdir()
    fetch = 'printf "%s\\n" "$@" >fetched; while [ ! -e done ]; do sleep 0.05; done; touch ended'
    for restart, root, fetches in ((0, "gs://b/a run", False), (1, None, False), (1, "gs://b/a run", True)):
        (at := tmp_path / f"{restart}-{root is None}").mkdir()
        environ = {contract.TIER_DIR: str(shm), **({} if root is None else {contract.RUN_ROOT: root})}
        program = "for _ in $(seq 100); do [ -e fetched ] && break; sleep 0.05; done; touch done; ls fetched"
        job = SlurmJob(["bash", "-c", program if fetches else "ls fetched"], 3, environ=environ, tiers=True)
        code, output, _ = run(at, slurm.script(job), restart, srun=PLAYED, orchestrator=fetch, sleep="/bin/sleep $1")
        assert (code == 0) == fetches, output
        if fetches:
            assert (at / "fetched").read_text().splitlines() == ["prefetch", "gs://b/a run", "--json"]


def test_where_the_queue_cannot_be_seen_nothing_is_removed(tmp_path: Path) -> None:
    shm = tmp_path / "shm"
    left = shm / f"orchestrator-slurm-{os.getuid()}-5"
    left.mkdir(parents=True)
    job = SlurmJob(["true"], 3, environ={contract.TIER_DIR: str(shm)}, tiers=True)
    for number, squeue in enumerate(("exit 1", "echo 6")):
        (at := tmp_path / str(number)).mkdir()
        run(at, slurm.script(job), srun=PLAYED, squeue=squeue)
        assert left.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 2", "no command to run; put it after --"),
        ("-- true", "--nodes is required"),
        ("--nodes 2 --min_nodes 3 -- true", "--min_nodes=3: expected at most --nodes=2"),
        ("--nodes 2 --sbatch=-Cx -- true", "--sbatch=-Cx: expected a long option"),
        ("--nodes 2 --partition 'a b' -- true", "--partition=a b: not an option that a script can hold"),
        ("--nodes 2 --job_name 'a\n#SBATCH' -- true", "not an option that a script can hold"),
        ("--nodes 2 --log_dir 'a%b' -- true", "--log_dir=a%b: expected a path without"),
        ("--nodes 2 --env=x -- true", "--env=x: expected NAME=VALUE"),
        ("--nodes 2 --env=A=\udcff -- true", "--env A '\\udcff': expected text in UTF-8"),
        ("--nodes 2 -- \udcff", "the program's '\\udcff': expected text in UTF-8"),
        ("--nodes 2 --partition '$(x)\n#SBATCH --x' -- true", "not an option that a script can hold"),
        ("--nodes 2 --submit -- true", "sbatch: no such program"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(arguments: str, message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "slurm", *shlex.split(arguments)],
        env={"PATH": "/nowhere", "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and done.stderr.startswith("launch slurm: ")


def test_a_directory_with_a_line_break_is_rejected() -> None:
    with pytest.raises(LaunchError, match="--log_dir=a\nb"):
        slurm.script(SlurmJob(["x"], 1, log_dir="a\nb"))

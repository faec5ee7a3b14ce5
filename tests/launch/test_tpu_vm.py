"""TPU VMs: the commands as printed, and carried out with a `gcloud` that keeps machines in files and runs what it is
asked to run on two workers, by a real bash."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.engines import tpu_vm
from launch.engines.tpu_vm import TpuJob
from tests.support.places import METACHARACTERS, NASTY

REPOSITORY = Path(__file__).parents[2]

GCLOUD = """\
#!/bin/bash
# State of the queued resource in ./state; every call in ./calls.
printf '%s\\n' "${*:3:3}" >>calls
case "$3 $4" in
"queued-resources create") echo ACTIVE >state ;;
"queued-resources describe") cat state 2>/dev/null ;;
"queued-resources delete") rm -f state ;;
"tpu-vm ssh")
  for word; do case "$word" in --command=*) remote=${word#--command=} ;; esac; done
  # Two machines have two homes.
  for worker in 0 1; do
    mkdir -p "home$worker"
    WORKER=$worker HOME=$PWD/home$worker bash -c "$remote" &
  done
  wait; exit 0 ;;
*) echo "gcloud: what is $*" >&2; exit 2 ;;
esac
"""


def launch(tmp_path: Path, flags: str, program: str) -> subprocess.Popen[str]:
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)
    command = [
        sys.executable,
        "-m",
        "launch",
        "tpu-vm",
        "--zone=z",
        "--name=job",
        f"--directory={tmp_path}",
    ]
    return subprocess.Popen(
        [*command, *flags.split(), "--run", "--", "bash", "-c", program],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tmp_path: Path, flags: str, program: str) -> tuple[int, str, str]:
    process = launch(tmp_path, flags, program)
    try:
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, error


def calls(tmp_path: Path) -> list[str]:
    return [" ".join(line.split()[:2]) for line in (tmp_path / "calls").read_text().splitlines()]


def test_the_plan_has_every_command_in_order_and_is_shell() -> None:
    job = TpuJob("run7", "us-east5-a", ["python", "a b"], slices=2, accelerator="v6e-16", spot=True, project="p")
    lines = [shlex.split(line) for line in tpu_vm.plan(job).splitlines() if line.startswith("gcloud")]
    assert [" ".join(words[3:5]) for words in lines] == [
        "queued-resources create",
        "queued-resources describe",
        *["tpu-vm ssh"] * 4,
        "queued-resources delete",
    ]
    assert all({"--zone=us-east5-a", "--project=p"} <= set(words) for words in lines)
    assert {"--node-count=2", "--node-prefix=run7", "--spot", "--accelerator-type=v6e-16"} <= set(lines[0])
    assert [words[5] for words in lines[2:6]] == ["run7-0", "run7-1", "run7-0", "run7-1"]
    there = tpu_vm.plan(TpuJob("run7", "z", ["x"]))
    assert "queued-resources" not in there, "machines that are there already are not ours to make or delete"


def test_an_image_runs_in_its_container_with_the_contract() -> None:
    job = TpuJob("run7", "z", ["python", "t.py"], image="img:1", environ={"A": "b c"})
    (remote,) = (word for word in tpu_vm.start(job, "run7", 3) if word.startswith("--command="))
    assert "sudo docker run --rm" in remote and "'--env=A=b c' img:1 python t.py" in remote
    assert "--env=ORCHESTRATOR_RESTART_COUNT=3" in remote
    assert "--volume=/dev/shm:/dev/shm" in remote, "a memory tier outlasts the container"


def test_the_workers_of_all_slices_run_the_program_and_machines_are_made_first(tmp_path: Path) -> None:
    program = 'echo "hello $WORKER $ORCHESTRATOR_RESTART_COUNT $A"'
    code, out, error = run(tmp_path, "--create --type=v6e-8 --slices=2 --env=A=b", program)
    assert code == 0, error
    assert (
        sum("hello 0 0 b" in line for line in out.splitlines())
        == 2
        == sum("hello 1 0 b" in line for line in out.splitlines())
    )
    assert calls(tmp_path)[:2] == ["queued-resources describe", "queued-resources create"]


def remote_of(job: TpuJob) -> str:
    (remote,) = (word for word in tpu_vm.start(job, "job", 0) if word.startswith("--command="))
    return remote.removeprefix("--command=")


def test_the_program_reaches_the_workers_word_for_word(tmp_path: Path) -> None:
    def output(job: TpuJob) -> str:
        environ = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(["bash", "-c", remote_of(job)], env=environ, capture_output=True, timeout=60)
        return done.stdout.decode()

    job = TpuJob("job", "z", ["printf", "%s\\0", *METACHARACTERS], environ={"NAME": NASTY}, directory=str(tmp_path))
    assert output(job) == "\0".join([*METACHARACTERS, "launch: the program ended with 0\n"])
    assert output(replace(job, program=["printenv", "NAME"])) == f"{NASTY}\nlaunch: the program ended with 0\n"
    assert f"--env=NAME={NASTY}" in shlex.split(remote_of(replace(job, image="img:1")))


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ('echo "launch: the program ended with 0"; exit 3', 3),
        ('echo "launch: the program ended with 9"', 0),
        ('echo "launch-0123456789abcdef: the program ended with 9"', 0),
        ("printf 'half a line'; exit 4", 4),
        ("printf '\\377\\376 no text'; exit 3", 3),
        ("head -c 300000 /dev/zero; exit 3", 3),
        ("printf '\\r\\033[2K'; exit 3", 3),
    ],
)
def test_only_our_own_line_reports_how_the_program_ended(tmp_path: Path, program: str, code: int) -> None:
    assert run(tmp_path, "--max_restarts=0", program)[0] == code


def test_a_worker_that_says_nothing_has_not_ended_well(tmp_path: Path) -> None:
    dies = '[ "$WORKER" = 0 ] || kill -9 $PPID'  # the shell that would have said it
    (tmp_path / "both").mkdir()
    assert run(tmp_path / "both", "--max_restarts=0", "kill -9 $PPID")[0] == 1
    code, out, _ = run(tmp_path, "--max_restarts=0", dies)
    assert code in (0, 137) and out.count("ended with") == 1, "gcloud's own code decides where one has no word"


@pytest.mark.parametrize("state", ["", "ACTIVE", "PROVISIONING", "garbage"])
def test_machines_that_are_not_known_to_be_gone_are_not_deleted(tmp_path: Path, state: str) -> None:
    """Also where nobody answers: gcloud without credentials says nothing on standard output."""
    failing = f'[ "$ORCHESTRATOR_RESTART_COUNT" != 0 ] || {{ echo {state} >state; exit 3; }}; echo ACTIVE >state'
    run(tmp_path, "--max_restarts=0 --create --type=v6e-8 --wait_s=1", failing)
    assert "queued-resources delete" not in calls(tmp_path)


def test_the_lock_is_in_the_users_home_and_nobody_elses(tmp_path: Path) -> None:
    assert run(tmp_path, "", "true")[0] == 0
    assert [path.name for path in (tmp_path / "home0").iterdir()] == [f".orchestrator-job-{os.uname().nodename}.lock"]
    job = TpuJob("job", "z", ["x"])
    assert "/tmp" not in " ".join([*tpu_vm.start(job, "n", 0), *tpu_vm.stop(job, "n")])


def test_a_failed_job_is_started_again_and_a_hopeless_one_is_not(tmp_path: Path) -> None:
    fails_once = '[ "$WORKER" = 0 ] || exit "$((ORCHESTRATOR_RESTART_COUNT == 0))"'
    code, _, error = run(tmp_path, "--max_restarts=1", fails_once)
    assert code == 0 and "restart 1" in error
    assert calls(tmp_path) == ["tpu-vm ssh"] * 2
    assert run(tmp_path, "--max_restarts=1", "exit 7")[0] == 7
    (tmp_path / "calls").unlink()
    assert run(tmp_path, "--max_restarts=9", "exit 5")[0] == 5
    assert calls(tmp_path) == ["tpu-vm ssh"]


def test_preempted_machines_are_made_again_and_cost_no_restart(tmp_path: Path) -> None:
    lost = '[ "$ORCHESTRATOR_RESTART_COUNT" != 0 ] || { echo SUSPENDED >state; exit 255; }'
    code, _, error = run(tmp_path, "--max_restarts=0 --create --type=v6e-8", lost)
    assert code == 0 and "the machines are gone: preempted" in error
    assert [call for call in calls(tmp_path) if "describe" not in call] == [
        "queued-resources create",
        "tpu-vm ssh",
        "queued-resources delete",
        "queued-resources create",
        "tpu-vm ssh",
    ]
    code, _, error = run(tmp_path, "--max_restarts=0", '[ "$ORCHESTRATOR_RESTART_COUNT" != 0 ] || exit 75')
    assert code == 0 and "preempted: the job has saved and resumes" in error


@pytest.mark.skipif(subprocess.run(["which", "fuser"], capture_output=True).returncode != 0, reason="no fuser (psmisc)")
def test_the_operators_signal_reaches_the_program_on_every_worker(tmp_path: Path) -> None:
    program = 'trap "echo saved $WORKER; exit 75" TERM; touch here$WORKER; while true; do sleep 0.1; done'
    process = launch(tmp_path, "", program)
    give_up = time.monotonic() + 30
    while not all((tmp_path / f"here{worker}").exists() for worker in (0, 1)) and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75, out + error
    assert "saved 0" in out and "saved 1" in out
    assert calls(tmp_path) == ["tpu-vm ssh"] * 2, "started once, told once"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name=a", "--", "x"], "--zone is required"),
        (["--name=a", "--zone=z"], "no command to run"),
        (["--name=A b", "--zone=z", "--", "x"], "--name=A b: expected at most 60"),
        (["--name=a", "--zone=z", "--create", "--", "x"], "--create needs --type"),
        (["--name=a", "--zone=z", "--directory=a;b", "--", "x"], "--directory=a;b: expected a path"),
        (["--name=a", "--zone=z", "--run", "--", "x"], "gcloud: no such program"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "tpu-vm", *arguments],
        env={"PATH": "/nowhere", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr and len(done.stderr.splitlines()) == 1

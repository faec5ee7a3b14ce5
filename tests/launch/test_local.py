"""The local launcher with real processes: small scripts without JAX, so that the whole file takes seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launching import (
    DEADLINE_S,
    INDEX,
    REPOSITORY,
    alive,
    eventually,
    job,
    launch,
    launched,
    pids,
    write_pid,
)

pytestmark = pytest.mark.jobs


def test_each_line_carries_its_hosts_name_and_each_host_its_own_contract() -> None:
    done = launch(
        ["--processes", "3", "--devices_per_process", "2"],
        "e = os.environ; print(i, e['ORCHESTRATOR_PROCESS_COUNT'], e['ORCHESTRATOR_LOCAL_DEVICES'],"
        " e['ORCHESTRATOR_RESTART_COUNT'], e['ORCHESTRATOR_HOST_NAME'])\n"
        "import sys; print('err', e['ORCHESTRATOR_COORDINATOR_ADDRESS'], file=sys.stderr, end='')",
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert [line for line in lines if "err" not in line] == [f"[host-{i}] {i} 3 2 0 host-{i}" for i in range(3)]
    errors = [line.split("] ")[1] for line in lines if "err" in line]
    assert len(errors) == 3 and len(set(errors)) == 1, "all hosts meet at one address"


def test_logs_hold_each_hosts_output_per_restart(tmp_path: Path) -> None:
    # Host 1 fails only once host 0 has printed: a failed host's peers are ended, whatever they had still to say.
    script = (
        "import pathlib, time; r = os.environ['ORCHESTRATOR_RESTART_COUNT']; print('run', r)\n"
        f"printed = pathlib.Path({str(tmp_path)!r}, f'printed-{{r}}')\n"
        "if i == 0: printed.touch()\n"
        f"limit = time.monotonic() + {DEADLINE_S / 4}\n"
        "while not printed.exists() and time.monotonic() < limit: time.sleep(0.01)\n"
        "raise SystemExit(i)"
    )
    logs = tmp_path / "logs"
    launch(["--processes", "2", "--max_restarts", "1", "--log_dir", str(logs)], script)
    first = {f"restart-{r}/host-{i}.log": f"run {r}\n" for r in (0, 1) for i in (0, 1)}
    assert {p.relative_to(logs).as_posix(): p.read_text() for p in logs.rglob("*.log")} == first
    for number in (2, 3):  # later runs take folders of their own
        again = launch(["--processes", "1", "--log_dir", str(logs)], f"print('again', {number})")
        assert f"logs go to {logs}/run-{number}: an earlier run has left its own in {logs}" in again.stderr
    texts = {p.relative_to(logs).as_posix(): p.read_text() for p in logs.rglob("*.log")}
    assert texts == first | {f"run-{n}/restart-0/host-0.log": f"again {n}\n" for n in (2, 3)}


@pytest.mark.parametrize(
    ("ending", "code"), [("raise SystemExit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("pass", 0)]
)
def test_the_launcher_leaves_with_the_jobs_code(ending: str, code: int) -> None:
    assert launch(["--processes", "2"], f"if i == 1: {ending}").returncode == code


def test_when_one_dies_the_others_are_ended_even_if_they_ignore_sigterm(tmp_path: Path) -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + write_pid(tmp_path)
        + f"while len(list(pathlib.Path({str(tmp_path)!r}).glob('*.pid'))) < 3: time.sleep(0.01)\n"
        + "if i == 1: os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    done = launch(["--processes", "3", "--end_grace_s", "0.3"], script)
    assert done.returncode == 137
    assert "host-1 was ended by SIGKILL; ending 2 others" in done.stderr
    assert len(pids(tmp_path)) == 3 and alive(tmp_path) == []


def test_a_killed_host_is_the_cause_even_if_a_survivor_that_crashed_is_seen_first(tmp_path: Path) -> None:
    patient = (
        "import sys, launch.__main__ as m, launch.host_processes as h\n"
        "h.SAME_MOMENT_S = 3.0; sys.exit(m.main(['launch', *sys.argv[1:]]))"
    )
    script = (
        f"import pathlib, time; ready = pathlib.Path({str(tmp_path)!r}, 'ready')\n"
        "if i: ready.touch(); time.sleep(0.5); os.kill(os.getpid(), 9)\n"
        "while not ready.exists(): time.sleep(0.01)\nos.abort()"
    )
    command = [sys.executable, "-c", patient, *job(["--processes", "2"], script)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 137 and "host-1 was ended by SIGKILL\n" in done.stderr, done.stderr


def test_what_a_process_started_is_ended_with_it(tmp_path: Path) -> None:
    child = INDEX.splitlines()[0] + "\n" + write_pid(tmp_path) + "import time; time.sleep(60)"
    script = (
        f"import subprocess, sys, time, pathlib; subprocess.Popen([sys.executable, '-S', '-c', {child!r}])\n"
        f"while not list(pathlib.Path({str(tmp_path)!r}).glob('*.pid')): time.sleep(0.01)"
    )
    assert launch(["--processes", "1"], script).returncode == 0
    assert len(pids(tmp_path)) == 1 and alive(tmp_path) == []


def test_a_failed_job_is_restarted_with_its_count_until_it_succeeds() -> None:
    script = "r = int(os.environ['ORCHESTRATOR_RESTART_COUNT']); print('run', r); raise SystemExit(i == 1 and r < 2)"
    done = launch(["--processes", "2", "--max_restarts", "5"], script)
    assert done.returncode == 0, done.stderr
    assert {f"[host-1] run {r}" for r in range(3)} <= set(done.stdout.splitlines())
    assert "run 3" not in done.stdout


def test_restarts_end_with_the_last_failures_code_and_may_change_the_hosts() -> None:
    script = (
        "e = os.environ; print(e['ORCHESTRATOR_PROCESS_COUNT'])\n"
        "raise SystemExit(3 + int(e['ORCHESTRATOR_RESTART_COUNT']))"
    )
    done = launch(["--processes", "2", "--max_restarts", "1", "--processes_after_restart", "1"], script)
    assert done.returncode == 4
    assert done.stdout.splitlines().count("[host-0] 1") == 1


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_wrong_usage_and_fenced_jobs_are_not_restarted(code: int) -> None:
    done = launch(["--processes", "1", "--max_restarts", "3"], f"print('run'); raise SystemExit({code})")
    assert (done.returncode, done.stdout.count("run")) == (code, 1)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_a_clean_end_is_success(tmp_path: Path, signum: signal.Signals) -> None:
    script = (
        "import signal, sys, time\n"
        f"def leave(*_): print('got', i); sys.exit(0)\nsignal.signal({int(signum)}, leave)\n"
        + write_pid(tmp_path)
        + "while True: time.sleep(0.05)"
    )
    with launched(["--processes", "2", "--max_restarts", "2"], script) as process:
        assert eventually(lambda: len(pids(tmp_path)) == 2)
        process.send_signal(signum)
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == ["[host-0] got 0", "[host-1] got 1"]
    assert alive(tmp_path) == []


def test_a_second_signal_kills_and_a_stopped_job_is_not_restarted(tmp_path: Path) -> None:
    script = (
        "import signal, time\ndef hold(*_): print('held', flush=True)\nsignal.signal(signal.SIGTERM, hold)\n"
        + write_pid(tmp_path)
        + "while True: time.sleep(0.05)"
    )
    with launched(["--processes", "1", "--max_restarts", "2"], script) as process:
        assert eventually(lambda: len(pids(tmp_path)) == 1)
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None and "held" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 137
    assert len(pids(tmp_path)) == 1 and alive(tmp_path) == []


BEAT = (
    "import json, time\ndef record(step):\n"
    "    p = e['ORCHESTRATOR_HEARTBEAT_FILE']\n    with open(p + '.x', 'w') as f:\n"
    "        json.dump({'doing': 'training', 'step': step}, f)\n    os.replace(p + '.x', p)\n"
)
ENVIRON = "e = os.environ; r = int(e['ORCHESTRATOR_RESTART_COUNT'])\n"


def test_a_host_without_heartbeats_is_killed_and_the_job_restarted() -> None:
    script = (
        ENVIRON + BEAT + "record(3)\nif r == 0 and i == 1: time.sleep(120)\nwhile r == 0: record(3); time.sleep(0.1)"
    )
    done = launch(["--processes", "2", "--max_restarts", "1", "--hang_after_s", "2", "--backoff_s", "0"], script)
    assert done.returncode == 0, done.stderr
    assert "host-1 hangs: silent for" in done.stderr and "last heard training at step 3" in done.stderr


def test_a_crash_loop_is_announced_and_the_next_start_steps_back() -> None:
    script = (
        ENVIRON
        + BEAT
        + (
            "print('back', e.get('ORCHESTRATOR_STEP_BACK'))\nrecord(7)\n"
            "raise SystemExit(e.get('ORCHESTRATOR_STEP_BACK') is None)"
        )
    )
    flags = ["--processes", "1", "--max_restarts", "5", "--step_back_after", "2", "--backoff_s", "0"]
    done = launch(flags, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[host-0] back None"] * 2 + ["[host-0] back 1"]
    assert "crash loop: 2 deaths in a row at step 7" in done.stderr


def test_an_elastic_job_restarts_on_the_hosts_that_are_listed(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a\nb\n\n")
    script = (
        ENVIRON
        + "print(e['ORCHESTRATOR_PROCESS_COUNT'])\nif r == 0: time.sleep(0.2); os.kill(os.getpid(), 9 * (i == 1))"
    )
    script = "import time\n" + script
    flags = [
        "--processes",
        "3",
        "--elastic",
        "2:4",
        "--max_restarts",
        "1",
        "--hosts_file",
        str(hosts),
        "--backoff_s",
        "0",
    ]
    done = launch(flags, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("[host-0] 2") == 1


def test_a_preempted_job_resumes_even_without_restarts_left() -> None:
    done = launch(["--processes", "2"], ENVIRON + "print('run', r)\nraise SystemExit(75 if r == 0 else 0)")
    assert done.returncode == 0, done.stderr
    assert "[host-1] run 1" in done.stdout and "preempted: the job has saved and resumes" in done.stderr


def test_nothing_is_left_when_the_launcher_itself_is_killed(tmp_path: Path) -> None:
    """Not what is in a session of its own, nor what has lost its parent as well, nor the heartbeats."""
    child = INDEX + write_pid(tmp_path) + "import time; time.sleep(60)"
    script = (
        f"import pathlib, subprocess, sys, time; child = [sys.executable, '-S', '-c', {child!r}]\n"
        "subprocess.Popen(child)\n"
        "subprocess.Popen(child, start_new_session=True, env={'ORCHESTRATOR_PROCESS_INDEX': str(i)})\n"
        "if os.fork() == 0: os.setsid(); subprocess.Popen(child); os._exit(0)\n"
        "beat = pathlib.Path(os.environ['ORCHESTRATOR_HEARTBEAT_FILE']); beat.write_text('{}')\n"
        f"pathlib.Path({str(tmp_path)!r}, 'beats').write_text(str(beat.parent))\n"
        + write_pid(tmp_path)
        + "time.sleep(60)"
    )
    with launched(["--processes", "2"], script) as process:
        assert eventually(lambda: len(pids(tmp_path)) == 8)
        beats = Path((tmp_path / "beats").read_text())
        assert len(list(beats.iterdir())) == 2
        os.kill(process.pid, signal.SIGKILL)
        assert eventually(lambda: alive(tmp_path) == []), f"still running: {alive(tmp_path)}"
        assert eventually(lambda: not beats.exists())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["local"], "--processes is required"),
        (["local", "--processes", "2"], "no command to run; put it after --"),
        (["local", "--processes", "0", "--", "true"], "--processes=0: expected at least 1"),
        (["local", "--processes", "2", "--max_restarts", "-1", "--", "true"], "--max_restarts=-1"),
        (["local", "--processes", "x", "--", "true"], "flag --processes=x"),
        (["local", "--processes", "2", "--", "no-such-program"], "no-such-program: no such program"),
        (["local", "--processes", "2", "true"], "unexpected 'true'; the program to run goes after --"),
        (["local", "--nope", "--", "true"], "nope"),
        (["local", "--processes", "1", "--log_dir", "/dev/null/x", "--", "true"], "--log_dir /dev/null/x"),
        (
            ["local", "--processes", "1", "--log_dir", "gs://bucket/x", "--", "true"],
            "--log_dir='gs://bucket/x': expected",
        ),
        (["local", "--processes", "1", "--hosts_file", "file:x", "--", "true"], "--hosts_file='file:x': expected a"),
        (["slurm", "--nodes", "1", "--log_dir", "gs://bucket/x", "--", "true"], "--log_dir='gs://bucket/x': expected"),
        (["gke", "--output", "gs://bucket/x", "--", "true"], "--output='gs://bucket/x': expected a path"),
        (["gke", "--check", "s3://bucket/x"], "--check='s3://bucket/x': expected a path"),
        (
            ["local", "--processes", "2", "--elastic", "3:4", "--", "true"],
            "--elastic=3:4: expected 1 <= MIN <= --processes",
        ),
        (["local", "--processes", "2", "--elastic", "many", "--", "true"], "--elastic=many: expected MIN:MAX"),
        (
            ["local", "--processes", "2", "--chaos", "nowhere=kill", "--", "true"],
            "'nowhere'; choose from abort",
        ),
        (["kubernetes"], "no command 'kubernetes'; choose from local"),
    ],
)
def test_a_users_mistake_is_one_clear_line_and_exit_2(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "launch", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr

"""A job on simulated hosts that loses one with its memory: the example trains on, bit for bit, from its neighbours'."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.example.report import Summary
from tests.support.launching import REPOSITORY, as_in_the_foreground, eventually

pytestmark = pytest.mark.jobs
DEADLINE_S = 240.0


def lines_of(path: Path) -> list[dict[str, object]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def trained(log: Path) -> dict[int, str]:
    """Loss and batch of each step, as they were printed."""
    found = re.findall(r"^step (\d+) +(loss \S+ +batch \S+)", log.read_text(), re.MULTILINE)
    return {int(step): text for step, text in found}


def host(launcher: int, index: int) -> psutil.Process:
    for process in psutil.Process(launcher).children(recursive=True):
        environ = process.environ()
        if environ.get("ORCHESTRATOR_PROCESS_INDEX") == str(index) and "ORCHESTRATOR_HEARTBEAT_FILE" in environ:
            return process
    raise AssertionError(f"host {index} does not run")


def test_a_host_that_is_lost_with_its_memory_costs_the_steps_since_the_newest_held_one(tmp_path: Path) -> None:
    root, logs, shm = tmp_path / "run", tmp_path / "logs", tmp_path / "shm"
    shm.mkdir()
    flags = ["--processes=2", "--domains=2", "--lose_tier_on_kill", "--max_restarts=1", "--end_grace_s=1"]
    flags += [f"--run_root={root}", f"--log_dir={logs}", f"--env=ORCHESTRATOR_TIER_DIR={shm}", "--backoff_s=0"]
    job = [sys.executable, "-m", "launch", "train", "--steps=40", "--save_every=1000", "--hold_every=10"]
    job += ["--layers=1", "--width=32", "--batch_size=8", "--length=32", "--step_delay_s=0.1"]
    job += ["--log_every=1", "--digests", "--domain=slice", f"--summary={tmp_path / 'summary'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "local", *flags, "--", *job],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XLA_FLAGS": "", "ORCHESTRATOR_TIER_DIR": str(shm)},
        preexec_fn=as_in_the_foreground,
    )
    try:
        events, log = root / "events" / "00000.jsonl", logs / "restart-0" / "host-0.log"

        def has_gone_further() -> bool:
            held = [one["step"] for one in lines_of(events) if one["event"] == "StepHeld"]
            return 10 in held and max(trained(log)) >= 12

        assert eventually(has_gone_further, DEADLINE_S)
        victim = host(process.pid, 1)
        secret = victim.environ()["ORCHESTRATOR_TIER_SECRET"]
        family = psutil.Process(process.pid).children(recursive=True)
        assert not any(secret in word for one in family for word in one.cmdline())
        os.kill(victim.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, output
    summary = Summary.read(tmp_path / "summary")
    assert summary.restored_step is not None and summary.restored_step >= 10, output
    assert "store" not in summary.restored_from and summary.restored_from, "no byte of arrays from the store"
    before, after = (trained(logs / f"restart-{restart}" / "host-0.log") for restart in (0, 1))
    again = before.keys() & after.keys()
    assert min(after) == summary.restored_step + 1 and again, "it had gone further than what was held"
    assert {step: before[step] for step in again} == {step: after[step] for step in again}, "bit for bit"
    launched = lines_of(logs / "launch.jsonl")
    lost = [one["host"] for one in launched if one["event"] == "exit" and one["lost"]]
    assert lost == [1] and "host-1 has lost its memory tier" in output
    assert list(shm.iterdir()) == []
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    written = [path for below in (root, logs) for path in below.rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in written) and secret not in output

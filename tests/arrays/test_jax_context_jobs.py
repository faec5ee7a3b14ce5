"""Several processes under settings of JAX: they meet, exchange and attest as without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import free_port

JOB = Path(__file__).parents[1] / "support" / "jobs" / "ambient_job.py"


@pytest.mark.jobs
@pytest.mark.parametrize("count", [2])
def test_two_processes_save_attest_exchange_and_restore_under_every_setting(tmp_path: Path, count: int) -> None:
    port = free_port()
    logs = [(tmp_path / f"{index}.out", tmp_path / f"{index}.err") for index in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, JOB, str(index), str(count), str(port), str(tmp_path / "runs")],
            stdout=out.open("w"),
            stderr=err.open("w"),
            env={**os.environ, "PYTHONPATH": str(JOB.parents[3])},
        )
        for index, (out, err) in enumerate(logs)
    ]
    try:
        codes = [process.wait(240) for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    for out, err in logs:
        lines = [json.loads(line) for line in out.read_text().splitlines() if line.startswith("{")]
        assert [line for line in lines if line["wrong"]] == [], err.read_text()[-4000:]
        assert lines and lines[-1]["setting"] == "done" and len(lines) == 23, err.read_text()[-4000:]
    assert codes == [0] * count

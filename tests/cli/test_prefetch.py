"""`orchestrator prefetch` as a command: which host it fetches for, and how mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import environment
from orchestrator.cli.main import main
from orchestrator.rules import contract
from tests.support.runs import fill

OURS = {contract.PROCESS_COUNT: "4", contract.PROCESS_INDEX: "3", contract.COORDINATOR_ADDRESS: "a:1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_LOCALID": "0", "SLURM_PROCID": "2"}
TPU = {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environ", "words", "host", "hosts"),
    [
        pytest.param({}, [], 0, 1, id="alone"),
        pytest.param({}, ["--host=1", "--hosts=3"], 1, 3, id="said"),
        pytest.param(OURS, [], 3, 4, id="our launcher"),
        pytest.param(OURS, ["--host=0", "--hosts=2"], 0, 2, id="said otherwise"),
        pytest.param(SLURM | {"SLURM_NTASKS": "4"}, [], 2, 4, id="a step of Slurm"),
        pytest.param(TPU, [], 1, 2, id="a TPU slice"),
        pytest.param(TPU | {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}, [], 5, 6, id="several slices"),
    ],
)
def test_it_fetches_for_the_host_that_it_runs_on(
    environ: dict[str, str],
    words: list[str],
    host: int,
    hosts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["orchestrator", "prefetch", str(tmp_path / "run"), *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["host"], said["hosts"], said["step"], said["kind"]) == (host, hosts, None, "")


@pytest.mark.parametrize(
    ("environ", "words", "message"),
    [
        ({}, ["--host=1"], "--host and --hosts: both are needed"),
        ({}, ["--host=2", "--hosts=2"], "--host=2: expected 0 to 1, as --hosts=2"),
        ({}, ["--timeout_s=0"], "--timeout_s=0: expected a positive number of seconds"),
        ({"TPU_ML_PLATFORM": "JAX"}, [], "which host this is cannot be told; say --host and --hosts"),
        ({environment.TIER_SECRET: "short"}, [], "ORCHESTRATOR_TIER_SECRET: expected an even number of hexadecimal"),
        ({environment.TIER_DIR: "here"}, [], "ORCHESTRATOR_TIER_DIR='here': expected an absolute path"),
    ],
)
def test_a_users_mistake_is_one_line(
    environ: dict[str, str],
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(tmp_path / "run", 1)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["orchestrator", "prefetch", str(tmp_path / "run"), *words]) == 2
    assert message in (said := capsys.readouterr().err) and len(said.splitlines()) == 1


def test_people_read_what_came_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, tier = tmp_path / "run", tmp_path / "tier"
    fill(root, 1)
    tier.mkdir()
    assert main(["orchestrator", "prefetch", str(root), f"--directory={tier}", "--host=0", "--hosts=2"]) == 0
    out = capsys.readouterr().out
    assert "step 1 e0001-a01, committed: host 0 of 2" in out and "0 B from peers" in out and "from the store" in out
    assert main(["orchestrator", "prefetch", str(root), f"--directory={tmp_path / 'not'}"]) == 1, "left to the restore"
    assert "left to the restore: make the tier's directory" in capsys.readouterr().out

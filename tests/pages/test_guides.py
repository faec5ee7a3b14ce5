"""The guides' commands, run as they stand by a real shell, as far as this machine can.

`orchestrator launch ...` is real; only paths and the number of steps are made small, and what would submit or start
something elsewhere is left to print it. Programs of other engines are stand-ins that say that they were called.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from launch import __main__ as launch_main
from launch.engines import gke, slurm, tpu_vm
from tests.support.platforms import COMPILING

pytestmark = pytest.mark.jobs

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GUIDES = ["docs/launching.md", "docs/slurm.md", "docs/gke.md", "docs/tpu-vm.md", "docs/containers.md"]
NOT_HERE = ("kubectl", "docker", "gcloud", "squeue", "scancel")
SMALLER = [
    ("/tmp/run", "run"),
    ("--steps=200", "--steps=3 --layers=1 --width=32 --length=16"),
    (" --submit", ""),
    (" --run ", " "),
    ("/scratch/run", "run"),
]


def blocks(page: str) -> list[str]:
    """The page's blocks with commands of a launcher, or of an engine."""
    found = [block for language, block in FENCE.findall((ROOT / page).read_text()) if not language]
    wanted = re.compile(r"^orchestrator launch (slurm|gke|tpu-vm)|^(" + "|".join(NOT_HERE) + ")", re.MULTILINE)
    return [block for block in found if wanted.search(block)]


def shell(tmp_path: Path, block: str) -> str:
    """Standard output and error of a block that must succeed."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    programs = {
        "python": f'exec {sys.executable} "$@"',
        "orchestrator": f'exec {sys.executable} -m orchestrator "$@"',
    }
    programs |= {name: f'echo "{name} is not here"' for name in NOT_HERE}
    for name, line in programs.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin_ / name).chmod(0o755)
    for found, smaller in SMALLER:
        block = block.replace(found, smaller)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env={**COMPILING, "PATH": f"{bin_}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


@pytest.mark.slow
def test_one_program_runs_here_and_is_written_for_every_engine(tmp_path: Path) -> None:
    (block,) = blocks("docs/launching.md")
    launches = [line for line in block.splitlines() if line.startswith("orchestrator launch ")]
    assert [line.split()[2] for line in launches] == ["local", "slurm", "gke", "tpu-vm"]
    assert all(line.endswith(" -- $TRAIN") for line in launches), "the same command line, word for word"
    out = shell(tmp_path, block)
    assert "[host-0] step 2     saving" in out
    assert "#SBATCH --nodes=4" in out and "kind: JobSet" in out and "gcloud compute tpus queued-resources create" in out


@pytest.mark.parametrize("page", GUIDES[1:])
def test_the_commands_of_a_guide_run(page: str, tmp_path: Path) -> None:
    found = blocks(page)
    assert found
    for number, block in enumerate(found):
        # The local launcher's line is that of launching.md, which has run above.
        elsewhere = re.sub(r"^orchestrator launch local (?:.*\\\n)*.*\n", "", block, flags=re.MULTILINE)
        if "orchestrator ls" in elsewhere:
            elsewhere = re.sub(r"^orchestrator ls.*\n", "", elsewhere, flags=re.MULTILINE)
        (at := tmp_path / str(number)).mkdir()
        shell(at, elsewhere)


@pytest.mark.parametrize(
    ("command", "values"),
    [("local", launch_main.FLAGS), ("slurm", slurm.FLAGS), ("gke", gke.FLAGS), ("tpu-vm", tpu_vm.FLAGS)],
)
def test_help_shows_every_flag(command: str, values: flags.FlagValues, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_main.main(["launch", command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: orchestrator launch {command} ")
    explained = [name for name in values if re.search(rf"^  --{name} +\S.{{10,}}$", shown, re.MULTILINE)]
    assert explained == list(values)

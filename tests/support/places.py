"""Processes that join their job by the contract, and say where in it JAX has put them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch import contract

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0
# What a shell, a manifest or a script could take for something else. A launcher hands them on word for word.
METACHARACTERS = [
    *("a b", " ", "", "it's", 'say "hi"', "\\", "\\n", "x\ny", "x\n#SBATCH --nodes=9", "#", "# x", "\t", "\r"),
    *("$HOME", "$(HOME)", "$$(HOME)", "$", "$$", "`id`", "$(id)", "${HOME}", "*", "?", "[a]", "~", "!!", "%j"),
    *("a;b", "a&b", "a|b", "a>b", "<(x)", "{a,b}", "--flag=x y", "-x", "é世\u202e", "\x1b[2J"),
    *("yes", "null", "1e3", "0x1", "- a", "a: b", "&a", "!x"),
]
NASTY = "\n".join(METACHARACTERS)

REPORT = """\
import json, os, sys
import jax
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # set where there are no chips
from launch import contract
found = contract.from_environment(os.environ)
try:
    contract.initialize(found)
except contract.ContractError as error:
    sys.exit(f"rejected: {error}")
print(json.dumps({
    "index": jax.process_index(), "count": jax.process_count(), "devices": jax.device_count(),
    "gpus": jax.config.values["jax_cuda_visible_devices"], "restarts": os.environ.get("ORCHESTRATOR_RESTART_COUNT"),
}))
"""


def start(environ: Mapping[str, str]) -> subprocess.Popen[str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "SLURM", "TPU"))
    }
    return subprocess.Popen(
        [sys.executable, "-c", REPORT],
        cwd=REPOSITORY,
        env={**clean, contract.LOCAL_DEVICES: "2", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reports(*environs: Mapping[str, str]) -> list[dict[str, object]]:
    processes = [start(environ) for environ in environs]
    try:
        ended = [process.communicate(timeout=DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), [err for _, err in ended]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]

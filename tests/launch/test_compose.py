"""The compose file: valid, its hosts one job, and its very commands run as processes of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import contract
from launch.contract import JobContract
from launch.gcs_emulator.process import environ
from tests.support.processes import free_port

pytestmark = pytest.mark.jobs

REPOSITORY = Path(__file__).parents[2]
FILE = REPOSITORY / "docker" / "docker-compose.yml"
SERVICES: dict[str, Any] = yaml.safe_load(FILE.read_text())["services"]
HOSTS = [name for name in SERVICES if name != "storage"]
DEADLINE_S = 150.0


def _is_there(compose: list[str]) -> bool:
    """A docker may be without its plugin."""
    return bool(shutil.which(compose[0])) and not subprocess.run([*compose, "version"], capture_output=True).returncode


def test_a_compose_of_this_machine_takes_the_file() -> None:
    command = next((words for words in (["docker-compose"], ["docker", "compose"]) if _is_there(words)), None)
    if command is None:
        pytest.skip("no compose: `make test-image` installs Debian's docker-compose")
    done = subprocess.run([*command, "-f", str(FILE), "config", "-q"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_hosts_are_one_job_and_have_time_to_save() -> None:
    told = [contract.from_environment(SERVICES[name]["environment"]) for name in HOSTS]
    assert told == [JobContract("host-0:8476", 4, i, 2, 0, name, 60.0, "gs://pod/run") for i, name in enumerate(HOSTS)]
    for name in HOSTS:
        assert SERVICES[name]["hostname"] == name
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= 60.0 + contract.LEAVING_S
        assert "ports" not in SERVICES[name] and "ports" not in SERVICES["storage"], "the emulator has no passwords"
        for variable, value in environ("http://storage:9023").items():
            assert SERVICES[name]["environment"][variable] == value


def start(service: Mapping[str, Any], here: Mapping[str, str], *more: str) -> subprocess.Popen[str]:
    """A service's command, and `more`, in its environment, with the pod's names and addresses replaced by this
    machine's."""

    def replaced(text: str) -> str:
        for pod, mine in here.items():
            text = text.replace(pod, mine)
        return text

    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ORCHESTRATOR_")}
    told = {name: replaced(value) for name, value in service.get("environment", {}).items()}
    program, *words = map(replaced, service["command"])
    here_is = {"python": [sys.executable], "orchestrator": [sys.executable, "-m", "orchestrator"]}
    return subprocess.Popen(
        [*here_is[program], *words, *more],
        cwd=REPOSITORY,
        env={**inherited, **told},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_pod_trains_into_its_bucket() -> None:
    port = str(free_port())
    here = {
        **{"storage:9023": f"127.0.0.1:{port}", "localhost:9023": f"127.0.0.1:{port}", "0.0.0.0": "127.0.0.1"},
        **{"--port=9023": f"--port={port}", "host-0:8476": f"127.0.0.1:{free_port()}", "--steps=200": "--steps=3"},
    }
    _, *test = SERVICES["storage"]["healthcheck"]["test"]
    test = [sys.executable, "-c", test[-1].replace("localhost:9023", f"127.0.0.1:{port}")]
    storage = start(SERVICES["storage"], here)
    hosts: list[subprocess.Popen[str]] = []
    try:
        give_up = time.monotonic() + DEADLINE_S
        while subprocess.run(test, capture_output=True, timeout=30).returncode:
            assert time.monotonic() < give_up and storage.poll() is None, "the emulator does not become healthy"
        small = ["--layers=1", "--width=32", "--length=16"]
        hosts = [start(SERVICES[name], here, *small) for name in HOSTS]
        said = [host.communicate(timeout=DEADLINE_S)[0] for host in hosts]
        assert [host.returncode for host in hosts] == [0] * 4, said
        assert "step 2     saving" in said[0]
        listing = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", "ls", "gs://pod/run"],
            env={**os.environ, **environ(f"http://127.0.0.1:{port}")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        rows = [line.split()[:2] for line in listing.stdout.splitlines()]
        assert listing.returncode == 0 and ["*", "2"] in rows, listing
    finally:
        for process in (*hosts, storage):
            process.kill()
            process.communicate()

"""Who can reach a job's ports: nobody but its own machines. In network namespaces of the test's own."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch import contract
from launch.contract import DetectedContract, Detection
from orchestrator.job import joining, listening
from tests.proof.chaos.network import ip, why_not
from tests.support.processes import free_port

REPOSITORY = Path(__file__).parents[2]
JOB = REPOSITORY / "tests" / "support" / "jobs" / "listening_job.py"
DEADLINE_S = 90.0
MACHINE = socket.gethostname()


# The rules.


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.9", "127.0.0.9"),
        ("localhost", "127.0.0.1"),
        ("198.51.100.7", None),  # an address of nobody here
        ("no-such-machine.invalid", None),
        ("", None),
        ("a" * 300, None),
        ("ü\udcff", None),
    ],
)
def test_an_address_is_listened_on_only_if_it_is_ours(host: str, address: str | None) -> None:
    found = listening.own_address(host)
    assert found == address or (host == "localhost" and found == "::1")


def test_a_name_that_means_loopback_here_means_another_address_to_others() -> None:
    found = listening.own_address(MACHINE)
    assert found is None or not ipaddress.ip_address(found).is_loopback


@pytest.mark.parametrize(
    ("coordinator", "told", "bound"),
    [
        ("127.0.0.1:80", None, "127.0.0.1:80"),
        ("run-0.run:8476", "127.0.0.1", "127.0.0.1:8476"),
        ("run-0.run:8476", "198.51.100.7", None),
        ("no-such-machine.invalid:8476", None, None),
    ],
)
def test_what_a_launcher_tells_comes_before_what_a_name_stands_for(
    coordinator: str, told: str | None, bound: str | None
) -> None:
    assert listening.bind_address(coordinator, told) == bound


SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURMD_NODENAME": "localhost", "SLURM_STEP_NODELIST": "localhost"}
GKE = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost,b"}


@pytest.mark.parametrize(
    ("detection", "environ", "bound"),
    [
        (Detection.SLURM, SLURM, "127.0.0.1:61447"),
        (Detection.SLURM, SLURM | {"SLURM_PROCID": "1"}, None),
        (Detection.SLURM, SLURM | {"JAX_COORDINATOR_PORT": "99"}, "127.0.0.1:99"),
        (Detection.SLURM, SLURM | {"SLURMD_NODENAME": "no-such-machine.invalid"}, None),
        (Detection.SLURM, SLURM | {"JAX_COORDINATOR_BIND_ADDRESS": "[::]:1"}, None),
        (Detection.GKE_TPU, GKE, "127.0.0.1:8476"),
        (Detection.GKE_TPU, GKE | {"TPU_WORKER_ID": "1"}, None),
        (Detection.GKE_TPU, GKE | {"MEGASCALE_SLICE_ID": "1"}, None),
        (Detection.GKE_TPU, GKE | {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}, "127.0.0.1:8476"),
        (Detection.GKE_TPU, GKE | {"TPU_WORKER_HOSTNAMES": "b", contract.HOST_ADDRESS: "127.0.0.1"}, "127.0.0.1:8476"),
        (Detection.TPU_VM, {}, None),
        (Detection.KUBERNETES, {}, None),
    ],
)
def test_a_job_that_jax_finds_listens_where_its_first_process_knows_its_name(
    detection: Detection, environ: dict[str, str], bound: str | None
) -> None:
    found = dict(environ)
    if not joining.JAX_TAKES_A_PORT and bound and "JAX_COORDINATOR_PORT" in environ:
        bound = "127.0.0.1:61447"
    assert joining._detected_bind_address(DetectedContract(detection, None, 0), found) == bound
    if detection is Detection.SLURM:
        jax = pytest.importorskip("jax._src.clusters.slurm_cluster").SlurmCluster
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_JOB_ID", "7")
            patch.setenv("SLURM_STEP_NODELIST", "localhost")
            port = [environ.get("JAX_COORDINATOR_PORT")] * joining.JAX_TAKES_A_PORT
            theirs = jax.get_coordinator_address(None, *port)
        ours = bound.rpartition(":")[2] if bound else found.get("JAX_COORDINATOR_PORT", "61447")
        assert theirs == f"localhost:{ours}", "JAX's own choice of a port"


# Real processes.


def sockets(folder: Path, processes: int, running: Sequence[subprocess.Popen[str]]) -> list[tuple[str, int]]:
    """Where all processes of the job listen."""
    give_up = time.monotonic() + DEADLINE_S
    while not all((folder / f"{index}.json").exists() for index in range(processes)):
        alive = time.monotonic() < give_up and all(process.poll() is None for process in running)
        assert alive, [process.communicate(timeout=10) for process in running]
        time.sleep(0.05)
    found = [json.loads((folder / f"{index}.json").read_text()) for index in range(processes)]
    return [(address, port) for one in found for address, port in one]


def start(command: Sequence[str | Path], environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "JAX_COORD"))}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**clean, "PYTHONPATH": str(REPOSITORY), **(environ or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(*running: subprocess.Popen[str]) -> None:
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def local_job(folder: Path) -> list[str | Path]:
    return [sys.executable, "-m", "launch", "local", "--processes=2", "--", sys.executable, JOB, folder]


@pytest.mark.jobs
def test_every_listening_socket_of_a_local_job_is_on_loopback(tmp_path: Path) -> None:
    job = start(local_job(tmp_path))
    try:
        found = sockets(tmp_path, 2, [job])
        (tmp_path / "go").touch()
        output, _ = job.communicate(timeout=DEADLINE_S)
        assert job.returncode == 0, output
    finally:
        end(job)
    assert len(found) >= 5, "the coordination service; Gloo and metrics of each process"
    assert [where for where in found if not loopback(where[0])] == []


def loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


INSIDE, OTHER, OUTSIDE = "oc-inside", "oc-other", "oc-outside"
A, B, A_OUTSIDE, C = "10.199.77.1", "10.199.77.2", "10.198.77.1", "10.198.77.2"


@pytest.fixture
def namespaces() -> Iterator[dict[str, str]]:
    """Three machines: `inside` and `other` share a network, `outside` is on another network of `inside`. The machine's
    name stands for its address in the first, as it does on most clusters. Name -> namespace."""
    if reason := why_not():
        pytest.skip(reason)
    names = {name: f"{name}-{os.getpid()}" for name in (INSIDE, OTHER, OUTSIDE)}
    hosts = Path("/etc/netns")
    try:
        for name in names.values():
            ip("netns", "add", name)
        wires = (("a", INSIDE, A, "b", OTHER, B), ("c", INSIDE, A_OUTSIDE, "d", OUTSIDE, C))
        for left, left_name, left_ip, right, right_name, right_ip in wires:
            ends = [f"oc{left}{os.getpid() % 100000}", f"oc{right}{os.getpid() % 100000}"]
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for link, name, address in ((ends[0], left_name, left_ip), (ends[1], right_name, right_ip)):
                ip("link", "set", link, "netns", names[name])
                ip("-n", names[name], "address", "add", f"{address}/24", "dev", link)
                ip("-n", names[name], "link", "set", link, "up")
                ip("-n", names[name], "link", "set", "lo", "up")
        for name, own in ((INSIDE, A), (OTHER, B), (OUTSIDE, C)):
            (hosts / names[name]).mkdir(parents=True)
            lines = ["127.0.0.1 localhost", f"{own} {MACHINE}", f"{A} inside", f"{B} other", "127.0.1.1 debian"]
            (hosts / names[name] / "hosts").write_text("\n".join(lines) + "\n")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)
            shutil.rmtree(hosts / name, ignore_errors=True)
        if hosts.is_dir() and not any(hosts.iterdir()):
            hosts.rmdir()


def within(namespace: str, command: Sequence[str | Path]) -> list[str | Path]:
    return ["ip", "netns", "exec", namespace, *command]


CONNECT = """\
import json, socket, sys
reached = []
for address, port in json.loads(sys.argv[1]):
    try:
        socket.create_connection((address, port), timeout=3).close()
        reached.append([address, port])
    except OSError:
        pass
print(json.dumps(reached))
"""


def reached(namespace: str, targets: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Those of `targets` that a process in that namespace can connect to."""
    command = within(namespace, [sys.executable, "-S", "-c", CONNECT, json.dumps(targets)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [(address, port) for address, port in json.loads(done.stdout)]


@pytest.mark.jobs
def test_nobody_outside_reaches_a_port_of_a_local_job(tmp_path: Path, namespaces: dict[str, str]) -> None:
    job = start(within(namespaces[INSIDE], local_job(tmp_path)))
    try:
        found = sockets(tmp_path, 2, [job])
        ports = sorted({port for _, port in found})
        everywhere = [(address, port) for address in (A, A_OUTSIDE) for port in ports]
        assert reached(namespaces[OTHER], everywhere) == reached(namespaces[OUTSIDE], everywhere) == []
        own = [("127.0.0.1", port) for port in ports]
        assert reached(namespaces[INSIDE], own) == own, "they are there, for their own machine"
        (tmp_path / "go").touch()
        output, _ = job.communicate(timeout=DEADLINE_S)
        assert job.returncode == 0, output
    finally:
        end(job)


@pytest.mark.jobs
def test_the_hosts_of_a_job_reach_each_other_and_another_network_does_not(
    tmp_path: Path, namespaces: dict[str, str]
) -> None:
    port = free_port()
    told = {
        contract.COORDINATOR_ADDRESS: f"inside:{port}",
        contract.PROCESS_COUNT: "2",
        contract.LOCAL_DEVICES: "1",
    }
    job = [
        start(within(namespaces[name], [sys.executable, JOB, tmp_path]), {**told, contract.PROCESS_INDEX: str(index)})
        for index, name in enumerate((INSIDE, OTHER))
    ]
    try:
        found = sockets(tmp_path, 2, job)
        first = json.loads((tmp_path / "0.json").read_text())
        assert not any(ipaddress.ip_address(address).is_unspecified for address, _ in found), found
        ports = sorted({port for _, port in first})
        assert reached(namespaces[OUTSIDE], [(A_OUTSIDE, port) for port in ports]) == []
        assert (A, port) in reached(namespaces[OTHER], [(A, port) for port in ports])
        (tmp_path / "go").touch()
        for process in job:
            output, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, output
    finally:
        end(*job)


def test_a_name_of_ones_own_that_means_loopback_only_here_is_not_listened_on(namespaces: dict[str, str]) -> None:
    names = "('debian', 'inside', 'other')"
    program = f"from orchestrator.job import listening; print([listening.own_address(n) for n in {names}])"
    done = subprocess.run(
        within(namespaces[INSIDE], [sys.executable, "-c", program]),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == f"[None, '{A}', None]", done.stderr

"""Who am I in this job? The contract's rules for every launcher, and JAX's own detections taken at their word."""

from __future__ import annotations

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import orchestrator as oc
from launch import contract
from launch.contract import DetectedContract, Detection, JobContract
from orchestrator.rules.contract import several
from tests.support.places import DEADLINE_S, REPOSITORY, reports, start
from tests.support.processes import free_port
from tests.support.runs import fill

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURMD_NODENAME": "n4",
}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    contract.COMPLETION_INDEX: "1",
    contract.PROCESS_COUNT: "6",
    contract.COORDINATOR_ADDRESS: "train-workers-0-0.train:8476",
}


def test_the_contract_survives_the_environment() -> None:
    given = JobContract("127.0.0.1:1", 4, 3, 2, 1, "host-3", 90.5, "gs://bucket/run")
    assert contract.from_environment(given.to_environment()) == given
    bare = JobContract("127.0.0.1:1", 4, 3, None, 0, "host-3")
    assert contract.from_environment(bare.to_environment()) == bare
    assert contract.from_environment({"PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {contract.PROCESS_INDEX: "4"},
            "ORCHESTRATOR_PROCESS_INDEX=4: expected less than ORCHESTRATOR_PROCESS_",
        ),
        ({contract.PROCESS_COUNT: "zwei"}, "ORCHESTRATOR_PROCESS_COUNT='zwei': expected a whole number of at least 1"),
        ({contract.LOCAL_DEVICES: "0"}, "ORCHESTRATOR_LOCAL_DEVICES='0'"),
        ({contract.COORDINATOR_ADDRESS: "here"}, "ORCHESTRATOR_COORDINATOR_ADDRESS='here': expected host:port"),
        ({contract.GRACE_PERIOD_S: "-1"}, "ORCHESTRATOR_GRACE_PERIOD_S='-1': expected a positive number of seconds"),
        ({contract.GRACE_PERIOD_S: "nan"}, "ORCHESTRATOR_GRACE_PERIOD_S='nan'"),
    ],
)
def test_a_broken_contract_names_the_variable(change: dict[str, str], message: str) -> None:
    environ = JobContract("127.0.0.1:1", 4, 3, 2, 1, "host-3").to_environment() | change
    with pytest.raises(contract.ContractError, match="^" + message.replace("[", r"\[")):
        contract.from_environment(environ)


def test_a_slurm_step_is_left_to_jax_and_has_its_whole_node_when_it_is_alone_there() -> None:
    found = contract.from_environment(SLURM | {"SLURM_RESTART_COUNT": "2"})
    evidence = "SLURM_NTASKS=4"
    assert found == DetectedContract(
        Detection.SLURM, None, 2, "n4", all_devices=True, process_count=4, evidence=evidence
    )
    crowded = contract.from_environment(SLURM | {"SLURM_NTASKS": "8"})
    assert isinstance(crowded, DetectedContract) and not crowded.all_devices
    batch_shell = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert contract.from_environment(batch_shell) is None, "the shell that calls srun is no process of the job"


def test_what_a_launcher_has_told_comes_before_what_could_be_detected() -> None:
    told = JobContract("127.0.0.1:1", 2, 0, 1, 0, "host-0")
    assert contract.from_environment(SLURM | POD | told.to_environment()) == told
    on_slurm = contract.from_environment(SLURM | {contract.RUN_ROOT: "/runs/a", contract.GRACE_PERIOD_S: "60"})
    assert on_slurm is not None and (on_slurm.run_root, on_slurm.grace_period_s) == ("/runs/a", 60.0)


@pytest.mark.parametrize(
    ("change", "index"),
    [({}, 1), ({contract.JOB_COUNT: "3", contract.JOB_INDEX: "2"}, 5), ({contract.PROCESS_INDEX: "4"}, 4)],
)
def test_a_pods_index_counts_the_jobs_before_its_own(change: dict[str, str], index: int) -> None:
    found = contract.from_environment(POD | change)
    assert isinstance(found, JobContract)
    assert (found.process_index, found.process_count, found.local_devices) == (index, 6, None)


@pytest.mark.parametrize("change", [{contract.JOB_COUNT: "4"}, {contract.JOB_INDEX: "1"}])
def test_pods_that_cannot_be_shared_out_are_rejected(change: dict[str, str]) -> None:
    with pytest.raises(contract.ContractError, match="ORCHESTRATOR_PROCESS_COUNT=6 cannot be shared out so"):
        contract.from_environment(POD | change)


@pytest.mark.parametrize(
    ("environ", "detection"),
    [
        ({"TPU_ML_PLATFORM": "JAX"}, Detection.TPU_VM),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "x"}, Detection.GKE_TPU),
        ({"KUBERNETES_SERVICE_HOST": "x", contract.COMPLETION_INDEX: "0"}, Detection.KUBERNETES),
    ],
)
def test_tpu_machines_and_foreign_pods_are_left_to_jax(environ: dict[str, str], detection: Detection) -> None:
    found = contract.from_environment(environ)
    assert isinstance(found, DetectedContract) and found.detection is detection


TPU = {"TPU_ML_PLATFORM": "JAX"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:1",
}
INDEXED = {"KUBERNETES_SERVICE_HOST": "x", contract.COMPLETION_INDEX: "1"}
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
ALONE = {contract.PROCESS_COUNT: "1"}


@pytest.mark.parametrize(
    ("environ", "evidence", "detection"),
    [
        pytest.param({}, "", None, id="a shell"),
        pytest.param(TORCHRUN, "", None, id="torchrun, which JAX does not know"),
        pytest.param({contract.PROCESS_COUNT: "2"}, "ORCHESTRATOR_PROCESS_COUNT=2", "error", id="our launcher"),
        pytest.param(ALONE, "", "in full", id="our launcher, one host"),
        pytest.param(POD, "ORCHESTRATOR_PROCESS_COUNT=6", "in full", id="our manifest"),
        pytest.param(SLURM, "SLURM_NTASKS=4", Detection.SLURM, id="srun"),
        pytest.param(SLURM | ALONE, "", "in full", id="a sweep under srun"),
        pytest.param(SLURM | {"SLURM_NTASKS": "1"}, "", Detection.SLURM, id="srun of one, a task of an array"),
        pytest.param(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, "", Detection.SLURM, id="the shell of salloc -n 4"),
        pytest.param({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "", None, id="a batch script"),
        pytest.param(SLURM | {"SLURM_NTASKS": "four"}, "", Detection.SLURM, id="srun, no number"),
        pytest.param(OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4", Detection.OPEN_MPI, id="mpirun"),
        pytest.param(SLURM | OPEN_MPI, "OMPI_COMM_WORLD_SIZE=4", Detection.OPEN_MPI, id="mpirun under Slurm"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4", Detection.MPI, id="mpirun of Open MPI 5"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "1"}, "", Detection.MPI, id="mpirun of one"),
        pytest.param({"PMI_SIZE": "3"}, "PMI_SIZE=3", Detection.MPI, id="mpiexec of MPICH"),
        pytest.param(
            SLURM | {"SLURM_NTASKS": "1", "PMI_SIZE": "3"}, "PMI_SIZE=3", Detection.MPI, id="its proxy by srun"
        ),
        pytest.param({"TPU_WORKER_HOSTNAMES": "a,b"}, "", None, id="TPU names without chips"),
        pytest.param(TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b", Detection.GKE_TPU, id="slice"),
        pytest.param(TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, "", Detection.GKE_TPU, id="one TPU host"),
        pytest.param(
            TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
            "MEGASCALE_NUM_SLICES=2",
            Detection.GKE_TPU,
            id="two slices of one host",
        ),
        pytest.param(TPU, "", Detection.TPU_VM, id="a TPU VM, whose metadata JAX asks"),
        pytest.param(INDEXED, "JOB_COMPLETION_INDEX=1", Detection.KUBERNETES, id="a pod of an Indexed Job"),
        pytest.param(INDEXED | {contract.COMPLETION_INDEX: "0"}, "", Detection.KUBERNETES, id="perhaps its only pod"),
        pytest.param(INDEXED | ALONE, "", "in full", id="a sweep as an Indexed Job"),
        pytest.param({"KUBERNETES_SERVICE_HOST": "x"}, "", None, id="any other pod"),
    ],
)
def test_who_is_one_of_several_and_by_which_variable(
    environ: dict[str, str], evidence: str, detection: Detection | str | None
) -> None:
    assert several(environ) == evidence
    if detection == "error":  # the launcher would have set more
        with pytest.raises(oc.UsageError, match="ORCHESTRATOR_PROCESS_INDEX is not set"):
            contract.from_environment(environ)
        return
    found = contract.from_environment(environ)
    assert {JobContract: "in full", type(None): None}.get(type(found), getattr(found, "detection", "")) == detection


LONE = """if True:
    import sys, jax, jax.numpy as jnp
    import orchestrator as oc
    if "late" in sys.argv:
        jax.devices(), oc.initialize()
    print(oc.open_run(sys.argv[2]).latest_step(), flush=True)  # readers are nobody's rivals
    if "evaluator" not in sys.argv:
        with oc.Agent(sys.argv[1], save=oc.every(1)) as agent:
            agent.save(0, {"w": jnp.ones(3)})
"""
JOINED = """if True:
    import sys, jax, jax.numpy as jnp
    import orchestrator as oc
    first, again = oc.initialize(), oc.initialize()
    assert first == again and first.run_root == sys.argv[1], (first, again)
    assert (first.process_index, first.process_count) == (jax.process_index(), jax.process_count())
    with oc.Agent(first.run_root, save=oc.every(1)) as agent:
        agent.save(0, {"w": jnp.ones(3)})
    print(first)
"""


def launched(program: str, *arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    flags = ["--processes", "2", "--run_root", str(root), "--end_grace_s", "20", "--"]
    command = [sys.executable, "-m", "launch", "local", *flags, sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.mark.jobs
def test_processes_that_have_not_joined_are_rejected_before_anything_is_written(tmp_path: Path) -> None:
    root = tmp_path / "run"
    fill(tmp_path / "other", 5)
    lone = launched(LONE, str(root), str(tmp_path / "other"), root=root)
    assert lone.returncode == 2 and not root.exists(), lone.stdout
    assert lone.stdout.count("    oc.initialize()\n") >= 1 and "set ORCHESTRATOR_PROCESS_COUNT=1" in lone.stdout
    assert "one of several of a job (ORCHESTRATOR_PROCESS_COUNT=2), but has not joined them" in lone.stdout
    late = launched(LONE, str(root), str(tmp_path / "other"), "late", root=root)
    assert late.returncode == 2 and not root.exists(), late.stdout
    assert "oc.initialize() comes too late: JAX has its devices already" in late.stdout
    evaluators = launched(LONE, str(root), str(tmp_path / "other"), "evaluator", root=root)
    assert (evaluators.returncode, evaluators.stdout.count("] 5\n")) == (0, 2), evaluators.stdout
    joined = launched(JOINED, str(root), root=root)
    assert joined.returncode == 0, joined.stdout
    assert "Place(process_index=1, process_count=2, host_name='host-1'" in joined.stdout
    assert oc.open_run(root).all_steps() == [0]


def test_a_sweep_under_srun_has_each_task_a_job_of_its_own(tmp_path: Path) -> None:
    program = JOINED.replace("first.run_root == sys.argv[1]", "first.process_count == 1")
    program = program.replace("oc.initialize(), oc.initialize()", "oc.initialize(), oc.initialize(); jax.devices()")
    environ = {**os.environ, **SLURM, **ALONE, contract.RUN_ROOT: str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environ, cwd=REPOSITORY, timeout=DEADLINE_S, check=True)


# JAX itself, in processes of their own. It decides at its import whether this is a machine with TPU chips.


class Metadata(BaseHTTPRequestHandler):
    """What the metadata server of a TPU VM says; the worker's number is the first part of the path."""

    def do_GET(self) -> None:
        worker, _, key = self.path.strip("/").partition("/computeMetadata/v1/instance/attributes/")
        said = {"agent-worker-number": worker, "worker-network-endpoints": "localhost,localhost", "tpu-env": ""}
        self.send_response(200 if key in said else 404)
        self.end_headers()
        self.wfile.write(said.get(key, "").encode())

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.mark.parametrize("where", ["a GKE slice", "a TPU VM"])
def test_jax_joins_the_workers_of_a_tpu_slice(where: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        environ = {"JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(free_port())}
        if where == "a GKE slice":
            environ["TPU_WORKER_HOSTNAMES"] = "localhost,localhost"
        at = f"127.0.0.1:{server.server_address[1]}"
        try:
            found = reports(*({**environ, "GCE_METADATA_IP": f"{at}/{i}", "TPU_WORKER_ID": str(i)} for i in range(2)))
        finally:
            server.shutdown()
    assert [(one["index"], one["count"], one["devices"]) for one in found] == [(0, 2, 4), (1, 2, 4)]


def test_one_task_a_node_keeps_all_devices_of_its_node() -> None:
    """Two tasks on this machine, though their step says that each has a node; and two that share one."""
    step = {**SLURM, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "3"}
    for nodes, gpus in (("2", ["all", "all"]), ("1", ["0", "1"])):
        shared = {**step, "SLURM_STEP_NUM_NODES": nodes, "JAX_COORDINATOR_PORT": str(free_port())}
        found = reports(*({**shared, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)))
        assert [one["gpus"] for one in found] == gpus, "the latter is what JAX does by itself with a task of several"
        assert [(one["index"], one["count"], one["restarts"]) for one in found] == [(0, 2, "3"), (1, 2, "3")]


def test_a_pod_that_nothing_can_place_is_told_what_is_missing() -> None:
    process = start({"KUBERNETES_SERVICE_HOST": "10.0.0.1", contract.COMPLETION_INDEX: "0"})
    _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "rejected: JOB_COMPLETION_INDEX=0 is set, but ORCHESTRATOR_PROCESS_COUNT is not" in error

"""Who am I in this job? The contract's rules for every launcher, and JAX's own detections taken at their word."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from launch import contract
from launch.contract import DetectedContract, Detection, JobContract
from tests.support.places import DEADLINE_S, reports, start
from tests.support.processes import free_port

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
    assert found == DetectedContract(Detection.SLURM, None, 2, "n4", all_devices=True)
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
    alone = {
        **SLURM,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "1",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": "0",
        "SLURM_RESTART_COUNT": "3",
    }
    whole, shared = reports(
        {**alone, "JAX_COORDINATOR_PORT": str(free_port())},
        {**alone, "JAX_COORDINATOR_PORT": str(free_port()), "SLURM_STEP_NUM_NODES": "2"},
    )
    assert (whole["gpus"], whole["restarts"]) == ("all", "3")
    assert shared["gpus"] == "0", "this is what JAX does by itself with a task of several"


def test_a_pod_that_nothing_can_place_is_told_what_is_missing() -> None:
    process = start({"KUBERNETES_SERVICE_HOST": "10.0.0.1", contract.COMPLETION_INDEX: "0"})
    _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "rejected: JOB_COMPLETION_INDEX is set, but ORCHESTRATOR_PROCESS_COUNT is not" in error

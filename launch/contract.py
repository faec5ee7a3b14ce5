"""What a launcher passes to each process of a job, and how the process turns that into a JAX runtime.

One resolver, `from_environment`, for every launcher. Who knows the most exact answer is asked first:

| what it finds                                     | who sets it                     | the rest comes from           |
|---------------------------------------------------|---------------------------------|-------------------------------|
| `ORCHESTRATOR_PROCESS_COUNT`                      | local launcher, manifests, you  | the variables below           |
| what a Slurm step has (`SLURM_PROCID`, ...)       | srun                            | JAX's Slurm detection         |
| `TPU_ML_PLATFORM` and worker host names           | JAX on TPU chips, and GKE       | JAX's detection of GKE slices |
| `TPU_ML_PLATFORM` alone                           | JAX on TPU chips                | JAX's detection of TPU VMs    |
| `KUBERNETES_SERVICE_HOST`, `JOB_COMPLETION_INDEX` | any other Indexed Job or JobSet | JAX's Kubernetes detection    |

The contract's own variables, the same for every launcher:

| variable                           | meaning                                                                |
|------------------------------------|------------------------------------------------------------------------|
| `ORCHESTRATOR_COORDINATOR_ADDRESS` | `host:port` where process 0 opens JAX's coordination service           |
| `ORCHESTRATOR_PROCESS_COUNT`       | number of processes in the job                                         |
| `ORCHESTRATOR_PROCESS_INDEX`       | this process, 0 to count - 1                                           |
| `ORCHESTRATOR_JOB_COUNT`, `_INDEX` | Kubernetes: equal Jobs (slices) in a JobSet, and this pod's; with      |
|                                    | `JOB_COMPLETION_INDEX` they stand in for the process index             |
| `ORCHESTRATOR_LOCAL_DEVICES`       | CPU devices that this process simulates; unset: the machine's own      |
| `ORCHESTRATOR_RESTART_COUNT`       | 0 in the first incarnation, one more after each restart of the job     |
| `ORCHESTRATOR_GRACE_PERIOD_S`      | seconds that a preempted process may wait for its last save            |
| `ORCHESTRATOR_RUN_ROOT`            | where the checkpoints are, for programs without a flag for it          |
| `ORCHESTRATOR_HOST_NAME`           | the name that people see in logs, `host-0` and so on                   |
| `ORCHESTRATOR_HOST_ADDRESS`        | this process's own address, to listen on; else what the coordinator's  |
|                                    | name stands for there                                                  |

Reading and writing the variables is pure; only `initialize` touches JAX, and imports it when called. It also decides on
which address process 0 listens (`launch.listening`; docs/networks.md). A process that has failed ends with `leave`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from launch import listening

# What the agent reads itself is part of the contract, too.
from orchestrator.environment import HEARTBEAT_FILE as HEARTBEAT_FILE
from orchestrator.environment import HOST_NAME as HOST_NAME
from orchestrator.environment import RESTART_COUNT as RESTART_COUNT
from orchestrator.environment import STEP_BACK as STEP_BACK
from orchestrator.errors import EXIT_PREEMPTED as EXIT_PREEMPTED

COORDINATOR_ADDRESS = "ORCHESTRATOR_COORDINATOR_ADDRESS"
PROCESS_COUNT = "ORCHESTRATOR_PROCESS_COUNT"
PROCESS_INDEX = "ORCHESTRATOR_PROCESS_INDEX"
JOB_COUNT = "ORCHESTRATOR_JOB_COUNT"
JOB_INDEX = "ORCHESTRATOR_JOB_INDEX"
LOCAL_DEVICES = "ORCHESTRATOR_LOCAL_DEVICES"
GRACE_PERIOD_S = "ORCHESTRATOR_GRACE_PERIOD_S"
RUN_ROOT = "ORCHESTRATOR_RUN_ROOT"
HOST_ADDRESS = "ORCHESTRATOR_HOST_ADDRESS"

COMPLETION_INDEX = "JOB_COMPLETION_INDEX"  # set by Kubernetes in every pod of an Indexed Job
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

COORDINATOR_PORT = 8476
INITIALIZATION_TIMEOUT_S = 300  # pods and nodes of one job come up minutes apart
LEAVING_S = 30.0  # from the last commit to the end of the process: what a launcher adds to the grace period


class ContractError(ValueError):
    """The variables are there, but do not make a job."""


class Detection(Enum):
    """JAX's own ways to find a job's processes; the value is its `cluster_detection_method`, None: JAX chooses."""

    SLURM = "slurm"
    GKE_TPU = "gketpu"
    TPU_VM = "gcetpu"
    KUBERNETES = None


@dataclass(frozen=True)
class JobContract:
    """One process's place in a job, in full. `local_devices` None: the machine's own, not simulated ones."""

    coordinator_address: str
    process_count: int
    process_index: int
    local_devices: int | None
    restart_count: int
    host_name: str
    grace_period_s: float | None = None
    run_root: str | None = None

    def to_environment(self) -> dict[str, str]:
        """The variables that make `from_environment` return an equal contract."""
        variables = {
            COORDINATOR_ADDRESS: self.coordinator_address,
            PROCESS_COUNT: str(self.process_count),
            PROCESS_INDEX: str(self.process_index),
            LOCAL_DEVICES: None if self.local_devices is None else str(self.local_devices),
            RESTART_COUNT: str(self.restart_count),
            GRACE_PERIOD_S: None if self.grace_period_s is None else f"{self.grace_period_s:g}",
            RUN_ROOT: self.run_root,
            HOST_NAME: self.host_name,
        }
        return {name: value for name, value in variables.items() if value is not None}


@dataclass(frozen=True)
class DetectedContract:
    """One process of a job that JAX finds by itself. `host_name` None: the machine's. `all_devices`: this process has
    the whole machine, though JAX would take one device for each task."""

    detection: Detection
    local_devices: int | None
    restart_count: int
    host_name: str | None = None
    grace_period_s: float | None = None
    run_root: str | None = None
    all_devices: bool = False

    def to_environment(self) -> dict[str, str]:
        """What the agent reads by itself, in the contract's own variables."""
        variables = {RESTART_COUNT: str(self.restart_count), HOST_NAME: self.host_name}
        return {name: value for name, value in variables.items() if value is not None}


Contract = JobContract | DetectedContract


def _whole(environ: Mapping[str, str], name: str, default: int | None, minimum: int) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ContractError(f"{name} is not set, though {PROCESS_COUNT} is; a launcher sets all of them")
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < minimum:
        raise ContractError(f"{name}={text!r}: expected a whole number of at least {minimum}")
    return int(text)


def _seconds(environ: Mapping[str, str], name: str) -> float | None:
    text = environ.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ContractError(f"{name}={text!r}: expected a positive number of seconds")
    return value


def from_environment(environ: Mapping[str, str]) -> Contract | None:
    """This process's contract, or None if no launcher started it. Pure.

    Raises: ContractError, naming the variable, if a variable is missing or cannot be used.
    """
    if PROCESS_COUNT in environ:
        return _in_full(environ)
    devices = _whole(environ, LOCAL_DEVICES, 0, 1) or None
    grace_s, root, name = _seconds(environ, GRACE_PERIOD_S), environ.get(RUN_ROOT), environ.get(HOST_NAME)
    restarts = _whole(environ, RESTART_COUNT, 0, 0)
    if all(variable in environ for variable in SLURM_STEP):
        restarts = _whole(environ, RESTART_COUNT, _whole(environ, "SLURM_RESTART_COUNT", 0, 0), 0)
        one_a_node = environ["SLURM_NTASKS"] == environ.get("SLURM_STEP_NUM_NODES")
        name = name or environ.get("SLURMD_NODENAME")
        return DetectedContract(Detection.SLURM, devices, restarts, name, grace_s, root, all_devices=one_a_node)
    if "TPU_ML_PLATFORM" in environ:
        named = "TPU_WORKER_HOSTNAMES" in environ or "TPU_PROCESS_ADDRESSES" in environ
        detection = Detection.GKE_TPU if named else Detection.TPU_VM
        return DetectedContract(detection, devices, restarts, name, grace_s, root)
    if "KUBERNETES_SERVICE_HOST" in environ and COMPLETION_INDEX in environ:
        return DetectedContract(Detection.KUBERNETES, devices, restarts, name, grace_s, root)
    return None


def _in_full(environ: Mapping[str, str]) -> JobContract:
    count = _whole(environ, PROCESS_COUNT, None, 1)
    if PROCESS_INDEX not in environ and COMPLETION_INDEX in environ:
        index = _index_of_pod(environ, count)
    else:
        index = _whole(environ, PROCESS_INDEX, None, 0)
    if index >= count:
        raise ContractError(f"{PROCESS_INDEX}={index}: expected less than {PROCESS_COUNT}={count}")
    address = environ.get(COORDINATOR_ADDRESS, "")
    if count > 1 and ":" not in address:
        raise ContractError(f"{COORDINATOR_ADDRESS}={address!r}: expected host:port")
    return JobContract(
        coordinator_address=address,
        process_count=count,
        process_index=index,
        local_devices=_whole(environ, LOCAL_DEVICES, 0, 1) or None,
        restart_count=_whole(environ, RESTART_COUNT, 0, 0),
        host_name=environ.get(HOST_NAME) or f"host-{index}",
        grace_period_s=_seconds(environ, GRACE_PERIOD_S),
        run_root=environ.get(RUN_ROOT),
    )


def _index_of_pod(environ: Mapping[str, str], count: int) -> int:
    """Pods are counted Job by Job, as JAX counts the hosts of TPU slices."""
    jobs = _whole(environ, JOB_COUNT, 1, 1)
    job = _whole(environ, JOB_INDEX, 0, 0)
    if count % jobs or job >= jobs:
        raise ContractError(f"{JOB_INDEX}={job} of {JOB_COUNT}={jobs}: {PROCESS_COUNT}={count} cannot be shared out so")
    return job * (count // jobs) + _whole(environ, COMPLETION_INDEX, None, 0)


def initialize(contract: Contract, environ: MutableMapping[str, str] = os.environ) -> None:
    """Connect this process to the others of its job, and give it its simulated devices if it is to have such.

    Call once, on the main thread, before any other use of JAX: the settings have no effect on a live backend. Waits at
    most INITIALIZATION_TIMEOUT_S for the other processes. Afterwards `environ` says what the agent reads by itself.
    Raises: ContractError where JAX's detection lacks what it needs; whatever `jax.distributed.initialize` does if the
    others do not come.
    """
    import jax

    environ.update(contract.to_environment())
    if contract.local_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", contract.local_devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    from orchestrator.job.rendezvous import collectives_listen_on, join_failure_reports

    if isinstance(contract, DetectedContract):
        _detect(contract, environ)
    elif contract.process_count > 1:
        host = contract.coordinator_address.rpartition(":")[0].strip("[]")
        if listening.is_loopback(host):
            collectives_listen_on(host)
        jax.distributed.initialize(
            coordinator_address=contract.coordinator_address,
            coordinator_bind_address=None
            if contract.process_index
            else _bind_address(contract.coordinator_address, environ),
            num_processes=contract.process_count,
            process_id=contract.process_index,
            # Empty is not None: all of the machine's devices, and no cluster detection for what is known already.
            local_device_ids=(),
            initialization_timeout=INITIALIZATION_TIMEOUT_S,
        )
    join_failure_reports()


def _bind_address(coordinator: str, environ: Mapping[str, str]) -> str | None:
    """Process 0's; None leaves it to JAX, which listens everywhere or where its own variable says."""
    from absl import logging

    if listening.BIND_ADDRESS in environ:
        return None
    address = listening.bind_address(coordinator, environ.get(HOST_ADDRESS))
    if address is None:
        logging.warning(
            "%s is not known to be an address of this machine: JAX's coordination service listens on all of them; "
            "%s=ADDRESS:PORT chooses one",
            coordinator,
            listening.BIND_ADDRESS,
        )
    return address


def _detected_bind_address(contract: DetectedContract, environ: MutableMapping[str, str]) -> str | None:
    """As `_bind_address`, of a job that JAX finds by itself: where its first process knows its own name. The port is
    JAX's choice, made here so that both know it."""
    if contract.detection is Detection.SLURM:
        port = environ.setdefault(listening.PORT, listening.slurm_port(environ["SLURM_JOB_ID"]))
        host = environ.get("SLURMD_NODENAME") if environ["SLURM_PROCID"] == "0" else None
    elif contract.detection is Detection.GKE_TPU:
        port = environ.setdefault(listening.PORT, str(COORDINATOR_PORT))
        host = listening.gke_slice_host(environ)
    else:
        return None
    return _bind_address(f"{host}:{port}", environ) if host else None


def _detect(contract: DetectedContract, environ: MutableMapping[str, str]) -> None:
    import importlib.util

    import jax

    if contract.detection is Detection.KUBERNETES and importlib.util.find_spec("kubernetes") is None:
        raise ContractError(
            f"{COMPLETION_INDEX} is set, but {PROCESS_COUNT} is not, and JAX's own Kubernetes detection needs the "
            "package `kubernetes`: set the variables (`orchestrator launch gke` writes them), or install jax[k8s]"
        )
    jax.distributed.initialize(
        coordinator_bind_address=_detected_bind_address(contract, environ),
        cluster_detection_method=contract.detection.value,
        local_device_ids=() if contract.all_devices else None,
        initialization_timeout=INITIALIZATION_TIMEOUT_S,
    )


def leave(code: int) -> NoReturn:
    """End this process with `code`, at once if it failed.

    After 0 and EXIT_PREEMPTED all processes leave together, and JAX may wait for them. One that fails must not: JAX's
    exit handler would wait minutes for the others, who wait for this one, and no launcher would learn of the failure.
    Where the others can learn of it, `orchestrator.job.peer_failure` does all that at `sys.exit`.
    """
    from orchestrator.job import peer_failure

    if code in (0, EXIT_PREEMPTED) or peer_failure.joined():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

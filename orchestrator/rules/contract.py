"""What a launcher passes to each process of a job, and how the process turns that into a JAX runtime.

One resolver, `from_environment`, for every launcher. Who knows the most exact answer is asked first:

| what it finds                                     | who sets it                     | the rest comes from           |
|---------------------------------------------------|---------------------------------|-------------------------------|
| `ORCHESTRATOR_PROCESS_COUNT`                      | local launcher, manifests, you  | the variables below           |
| `OMPI_COMM_WORLD_SIZE`                            | Open MPI's mpirun               | JAX's detection of Open MPI   |
| what a Slurm step has (`SLURM_PROCID`, ...)       | srun                            | JAX's Slurm detection         |
| `PMI_SIZE`                                        | MPICH's and Intel's mpiexec     | JAX's detection by mpi4py     |
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

`ORCHESTRATOR_PROCESS_COUNT=1`, alone, makes a job of its own out of each of several processes that a launcher has
started (a sweep, each with a root of its own). `torchrun`'s variables count for nothing: JAX does not know them either.

Pure: how a process joins its job is in `job/joining`, whose `initialize` is `orchestrator.initialize`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from orchestrator.environment import HOST_NAME, RESTART_COUNT
from orchestrator.errors import UsageError

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


class ContractError(UsageError):
    """The variables are there, but do not make a job."""


class Detection(Enum):
    """JAX's own ways to find a job's processes; the value is its `cluster_detection_method`, None: JAX chooses."""

    OPEN_MPI = "ompi"
    SLURM = "slurm"
    MPI = "mpi4py"
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
    process_count: int | None = None
    evidence: str = ""

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
    found = _detected(environ)
    if found is None:
        return None
    one_a_node = False
    if found.detection is Detection.SLURM:
        restarts = _whole(environ, RESTART_COUNT, _whole(environ, "SLURM_RESTART_COUNT", 0, 0), 0)
        one_a_node = environ["SLURM_NTASKS"] == environ.get("SLURM_STEP_NUM_NODES")
        name = name or environ.get("SLURMD_NODENAME")
    return DetectedContract(
        found.detection,
        devices,
        restarts,
        name,
        grace_s,
        root,
        all_devices=one_a_node,
        process_count=found.count,
        evidence=found.evidence,
    )


def several(environ: Mapping[str, str]) -> str:
    """The variable, with its value, by which this process is one of several of a job; '' if none says so. Pure.

    A pod of somebody else's Indexed Job knows its index and not how many there are: the one of index 0 may be alone.
    """
    if PROCESS_COUNT in environ:
        count = environ[PROCESS_COUNT]
        return "" if _number(count) == 1 else f"{PROCESS_COUNT}={count}"
    found = _detected(environ)
    if found is None:
        return ""
    if found.detection is Detection.KUBERNETES:
        return "" if environ[COMPLETION_INDEX] == "0" else found.evidence
    return found.evidence if found.count is not None and found.count > 1 else ""


@dataclass(frozen=True)
class _Found:
    """What one source says: of how many processes; None where it does not say."""

    detection: Detection
    count: int | None
    evidence: str


def _detected(environ: Mapping[str, str]) -> _Found | None:
    """The first source that speaks of several processes, or cannot say; else the first that speaks of one."""
    sources = (_open_mpi(environ), _slurm(environ), _mpi(environ), _tpu(environ), _pod(environ))
    found = [source for source in sources if source]
    return next((source for source in found if source.count != 1), found[0] if found else None)


def _open_mpi(environ: Mapping[str, str]) -> _Found | None:
    count = _number(environ.get("OMPI_COMM_WORLD_SIZE"))
    # Open MPI 5 has no such address any more: JAX needs mpi4py there.
    detection = Detection.OPEN_MPI if "OMPI_MCA_orte_hnp_uri" in environ else Detection.MPI
    return _Found(detection, count, f"OMPI_COMM_WORLD_SIZE={count}") if count else None


def _slurm(environ: Mapping[str, str]) -> _Found | None:
    if not all(variable in environ for variable in SLURM_STEP):
        return None  # the shell of a batch script has some of them, and is no process of the job
    # In the shell that `salloc` opens, SLURM_NTASKS is the allocation's, and the step is that one shell.
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _Found(Detection.SLURM, _number(environ[name]), f"{name}={environ[name]}")


def _mpi(environ: Mapping[str, str]) -> _Found | None:
    count = _number(environ.get("PMI_SIZE"))
    return _Found(Detection.MPI, count, f"PMI_SIZE={count}") if count else None


def _tpu(environ: Mapping[str, str]) -> _Found | None:
    if "TPU_ML_PLATFORM" not in environ:
        return None
    slices = _number(environ.get("MEGASCALE_NUM_SLICES")) or 1
    for name in ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # as JAX looks
        if hosts := environ.get(name):
            if name.endswith("_PATH"):  # a file; what is in it is for JAX to read
                return _Found(Detection.GKE_TPU, None, "")
            count = slices * len(hosts.split(","))
            evidence = f"MEGASCALE_NUM_SLICES={slices}" if slices > 1 else f"{name}={hosts}"
            return _Found(Detection.GKE_TPU, count, evidence)
    return _Found(Detection.TPU_VM, 1 if "TPU_SKIP_MDS_QUERY" in environ else None, "")


def _pod(environ: Mapping[str, str]) -> _Found | None:
    if "KUBERNETES_SERVICE_HOST" not in environ or COMPLETION_INDEX not in environ:
        return None
    return _Found(Detection.KUBERNETES, None, f"{COMPLETION_INDEX}={environ[COMPLETION_INDEX]}")


def _number(text: str | None) -> int | None:
    """What others have set: None for what is no number."""
    return int(text) if text and text.isascii() and text.isdigit() else None


def _in_full(environ: Mapping[str, str]) -> JobContract:
    count = _whole(environ, PROCESS_COUNT, None, 1)
    if count == 1:
        index = 0  # somebody says that this process is a job of its own, whatever place a launcher gave it
    elif PROCESS_INDEX not in environ and COMPLETION_INDEX in environ:
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

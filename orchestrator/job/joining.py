"""How a process joins the others of its job: `orchestrator.initialize`. One that has not joined them is rejected by
`rendezvous.connect`: it would be taken for a job of its own, and fence the others.

Which variables say so is in `rules/contract`; on which address process 0 listens, in `job/listening`
(docs/networks.md). Main thread.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import jax
from absl import logging

from orchestrator.arrays import jax_internals
from orchestrator.errors import UsageError
from orchestrator.job import listening
from orchestrator.job.rendezvous import collectives_listen_on, host_name, join_failure_reports
from orchestrator.rules import contract as rules
from orchestrator.rules.contract import Contract, DetectedContract, Detection, JobContract

INITIALIZATION_TIMEOUT_S = 300  # pods and nodes of one job come up minutes apart
JAX_TAKES_A_PORT = jax.__version_info__ >= (0, 8, 1)  # before, JAX_COORDINATOR_PORT is nothing to it


@dataclass(frozen=True)
class Place:
    """This process's place in its job, and what the launcher passes on. run_root: None if it names none.
    grace_period_s: for `Options.preemption_grace_s`; None if it names none. restart_count: 0 in the first
    incarnation."""

    process_index: int
    process_count: int
    host_name: str
    restart_count: int = 0
    run_root: str | None = None
    grace_period_s: float | None = None


def initialize() -> Place:
    """Connect this process to the others of its job, wherever it was started: under `orchestrator launch`, srun, a
    JobSet or Indexed Job, on TPU hosts, under mpirun. Does nothing when it is alone. Returns its place.

    Call it once, on the main thread, before anything else of JAX; a second call, or one after
    `jax.distributed.initialize`, only returns the place. Waits 300 s at most for the other processes.
    `ORCHESTRATOR_PROCESS_COUNT=1` says that this process is a job of its own, whatever has started it.
    Raises UsageError, naming the variable, where the variables do not make a job, or JAX has been used already;
    whatever `jax.distributed.initialize` does if the others do not come.
    """
    found = rules.from_environment(os.environ)  # after the import of JAX, which says what it finds of TPUs
    joined = jax_internals.process_of_job()
    if joined is not None:
        logging.info("jax.distributed is initialized already: process %d of %d", *joined)
        os.environ.update(found.to_environment() if found else {})
        join_failure_reports()
    elif found:
        join(found)
    return _place(found)


def join(found: Contract, environ: MutableMapping[str, str] = os.environ) -> None:
    """As `initialize`, with a contract that is known. Afterwards `environ` says what the agent reads by itself."""
    alone = found.process_count == 1
    if jax_internals.has_backend() and not (alone and found.local_devices is None):
        raise UsageError(
            f"oc.initialize() comes too late: JAX has its devices already, and this process is {_which(found)}. "
            "Call it before anything else of JAX (jax.devices, jax.random.key, an array, a mesh), also before imports "
            "that make arrays"
        )
    environ.update(found.to_environment())
    if found.local_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", found.local_devices)
    if alone:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if isinstance(found, DetectedContract):
        _detect(found, environ)
    else:
        _connect(found, environ)
    join_failure_reports()


def _which(found: Contract) -> str:
    if found.process_count == 1:
        return f"to have {found.local_devices} simulated devices"
    if isinstance(found, JobContract):
        return f"process {found.process_index} of {found.process_count}"
    return f"one of a job ({found.evidence or found.detection.value})"


def _place(found: Contract | None) -> Place:
    index, count = jax_internals.process_of_job() or (0, 1)
    if found is None:
        return Place(index, count, host_name())
    return Place(index, count, host_name(), found.restart_count, found.run_root, found.grace_period_s)


def _connect(found: JobContract, environ: MutableMapping[str, str]) -> None:
    host = found.coordinator_address.rpartition(":")[0].strip("[]")
    if listening.is_loopback(host):
        collectives_listen_on(host)
    jax.distributed.initialize(
        coordinator_address=found.coordinator_address,
        coordinator_bind_address=None
        if found.process_index
        else _bind_address(found.coordinator_address, environ.get(rules.HOST_ADDRESS), environ),
        num_processes=found.process_count,
        process_id=found.process_index,
        # Empty is not None: all of the machine's devices, and no cluster detection for what is known already.
        local_device_ids=(),
        initialization_timeout=INITIALIZATION_TIMEOUT_S,
    )


def _bind_address(coordinator: str, known_address: str | None, environ: Mapping[str, str]) -> str | None:
    """Process 0's; None leaves it to JAX, which listens everywhere or where its own variable says."""
    if listening.BIND_ADDRESS in environ:
        return None
    address = listening.bind_address(coordinator, known_address)
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
    asked: MutableMapping[str, str] = environ if JAX_TAKES_A_PORT else {}
    if contract.detection is Detection.SLURM:
        port = asked.setdefault(listening.PORT, listening.slurm_port(environ["SLURM_JOB_ID"]))
        host = environ.get("SLURMD_NODENAME") if environ["SLURM_PROCID"] == "0" else None
    elif contract.detection is Detection.GKE_TPU:
        port = asked.setdefault(listening.PORT, str(rules.COORDINATOR_PORT))
        host = listening.gke_slice_host(environ)
    else:
        return None
    return _bind_address(f"{host}:{port}", environ.get(rules.HOST_ADDRESS), environ) if host else None


def _detect(found: DetectedContract, environ: MutableMapping[str, str]) -> None:
    missing = {Detection.KUBERNETES: "kubernetes", Detection.MPI: "mpi4py"}.get(found.detection)
    if missing and importlib.util.find_spec(missing) is None:
        raise rules.ContractError(
            f"{found.evidence} is set, but {rules.PROCESS_COUNT} is not, and JAX's own detection needs the package "
            f"`{missing}`: set {rules.PROCESS_COUNT}, {rules.PROCESS_INDEX} and {rules.COORDINATOR_ADDRESS} "
            f"(`orchestrator launch` does), or install `{missing}`; {rules.PROCESS_COUNT}=1 if this process is alone"
        )
    jax.distributed.initialize(
        coordinator_bind_address=_detected_bind_address(found, environ),
        cluster_detection_method=found.detection.value,
        local_device_ids=() if found.all_devices else None,
        initialization_timeout=INITIALIZATION_TIMEOUT_S,
    )

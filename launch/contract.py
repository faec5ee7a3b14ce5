"""What a launcher tells each process of a job, and how the process turns that into a JAX runtime.

The contract is six environment variables, the same for every launcher:

| variable                           | meaning                                                                |
|------------------------------------|------------------------------------------------------------------------|
| `ORCHESTRATOR_COORDINATOR_ADDRESS` | `host:port` where process 0 opens JAX's coordination service           |
| `ORCHESTRATOR_PROCESS_COUNT`       | number of processes in the job                                         |
| `ORCHESTRATOR_PROCESS_INDEX`       | this process, 0 to count - 1                                           |
| `ORCHESTRATOR_LOCAL_DEVICES`       | CPU devices that this process simulates                                |
| `ORCHESTRATOR_RESTART_COUNT`       | 0 in the first incarnation, one more after each restart of the job     |
| `ORCHESTRATOR_HOST_NAME`           | the name that people see in logs, `host-0` and so on                   |

Reading and writing the variables is pure; only `initialize` touches JAX, and imports it when called. A process that has
failed ends with `leave`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

COORDINATOR_ADDRESS = "ORCHESTRATOR_COORDINATOR_ADDRESS"
PROCESS_COUNT = "ORCHESTRATOR_PROCESS_COUNT"
PROCESS_INDEX = "ORCHESTRATOR_PROCESS_INDEX"
LOCAL_DEVICES = "ORCHESTRATOR_LOCAL_DEVICES"
RESTART_COUNT = "ORCHESTRATOR_RESTART_COUNT"
HOST_NAME = "ORCHESTRATOR_HOST_NAME"
# Read by the agent itself: where it shows that it lives, and how many of the newest steps it leaves out.
HEARTBEAT_FILE = "ORCHESTRATOR_HEARTBEAT_FILE"
STEP_BACK = "ORCHESTRATOR_STEP_BACK"

INITIALIZATION_TIMEOUT_S = 120

EXIT_PREEMPTED = 75  # sysexits' EX_TEMPFAIL: told to stop by SIGTERM, saved and left; starting again goes on


class ContractError(ValueError):
    """The variables are there, but do not make a job."""


@dataclass(frozen=True)
class JobContract:
    """One process's place in a job."""

    coordinator_address: str
    process_count: int
    process_index: int
    local_devices: int
    restart_count: int
    host_name: str

    def to_environment(self) -> dict[str, str]:
        """The variables that make `from_environment` return an equal contract."""
        return {
            COORDINATOR_ADDRESS: self.coordinator_address,
            PROCESS_COUNT: str(self.process_count),
            PROCESS_INDEX: str(self.process_index),
            LOCAL_DEVICES: str(self.local_devices),
            RESTART_COUNT: str(self.restart_count),
            HOST_NAME: self.host_name,
        }


def _whole(environ: Mapping[str, str], name: str, default: int | None, minimum: int) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ContractError(f"{name} is not set, though {PROCESS_COUNT} is; a launcher sets all of them")
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < minimum:
        raise ContractError(f"{name}={text!r}: wanted a whole number of at least {minimum}")
    return int(text)


def from_environment(environ: Mapping[str, str]) -> JobContract | None:
    """This process's contract, or None if no launcher started it (`ORCHESTRATOR_PROCESS_COUNT` is not set).

    Raises: ContractError, naming the variable, if a variable is missing or cannot be used.
    """
    if PROCESS_COUNT not in environ:
        return None
    count = _whole(environ, PROCESS_COUNT, None, 1)
    index = _whole(environ, PROCESS_INDEX, None, 0)
    if index >= count:
        raise ContractError(f"{PROCESS_INDEX}={index}: wanted less than {PROCESS_COUNT}={count}")
    address = environ.get(COORDINATOR_ADDRESS, "")
    if count > 1 and ":" not in address:
        raise ContractError(f"{COORDINATOR_ADDRESS}={address!r}: wanted host:port")
    return JobContract(
        coordinator_address=address,
        process_count=count,
        process_index=index,
        local_devices=_whole(environ, LOCAL_DEVICES, 1, 1),
        restart_count=_whole(environ, RESTART_COUNT, 0, 0),
        host_name=environ.get(HOST_NAME) or f"host-{index}",
    )


def initialize(contract: JobContract) -> None:
    """Give this process its simulated devices and, in a job of several, connect it to the others.

    Call once, on the main thread, before any other use of JAX: the settings have no effect on a live backend. Waits at
    most INITIALIZATION_TIMEOUT_S for the other processes.
    Raises: whatever `jax.distributed.initialize` does if the others do not come.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", contract.local_devices)
    if contract.process_count == 1:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator_address=contract.coordinator_address,
        num_processes=contract.process_count,
        process_id=contract.process_index,
        initialization_timeout=INITIALIZATION_TIMEOUT_S,
    )


def leave(code: int) -> NoReturn:
    """End this process with `code`, at once if it failed.

    After 0 and EXIT_PREEMPTED all processes leave together, and JAX may wait for them. One that fails must not: JAX's
    exit handler would wait minutes for the others, who wait for this one, and no launcher would learn of the failure.
    """
    if code in (0, EXIT_PREEMPTED):
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

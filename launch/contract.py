"""What launchers and programs use of the contract: the variables, and this process's place by them. The rules are in
`orchestrator.rules.contract`; programs call `orchestrator.initialize()`.
"""

from __future__ import annotations

# What the agent reads itself is part of the contract, too.
from orchestrator.environment import DOMAIN as DOMAIN
from orchestrator.environment import HEARTBEAT_FILE as HEARTBEAT_FILE
from orchestrator.environment import HOST_NAME as HOST_NAME
from orchestrator.environment import RESTART_COUNT as RESTART_COUNT
from orchestrator.environment import STEP_BACK as STEP_BACK
from orchestrator.environment import TIER_DIR as TIER_DIR
from orchestrator.environment import TIER_PEERS as TIER_PEERS
from orchestrator.environment import TIER_SECRET as TIER_SECRET
from orchestrator.environment import TIER_SERVER as TIER_SERVER
from orchestrator.errors import EXIT_PREEMPTED as EXIT_PREEMPTED
from orchestrator.job.peer_failure import leave as leave
from orchestrator.rules.contract import COMPLETION_INDEX as COMPLETION_INDEX
from orchestrator.rules.contract import COORDINATOR_ADDRESS as COORDINATOR_ADDRESS
from orchestrator.rules.contract import COORDINATOR_PORT as COORDINATOR_PORT
from orchestrator.rules.contract import GRACE_PERIOD_S as GRACE_PERIOD_S
from orchestrator.rules.contract import HOST_ADDRESS as HOST_ADDRESS
from orchestrator.rules.contract import JOB_COUNT as JOB_COUNT
from orchestrator.rules.contract import JOB_INDEX as JOB_INDEX
from orchestrator.rules.contract import LOCAL_DEVICES as LOCAL_DEVICES
from orchestrator.rules.contract import PROCESS_COUNT as PROCESS_COUNT
from orchestrator.rules.contract import PROCESS_INDEX as PROCESS_INDEX
from orchestrator.rules.contract import RUN_ROOT as RUN_ROOT
from orchestrator.rules.contract import Contract as Contract
from orchestrator.rules.contract import ContractError as ContractError
from orchestrator.rules.contract import DetectedContract as DetectedContract
from orchestrator.rules.contract import Detection as Detection
from orchestrator.rules.contract import JobContract as JobContract
from orchestrator.rules.contract import from_environment as from_environment

LEAVING_S = 30.0  # from the last commit to the end of the process: what a launcher adds to the grace period


def initialize(contract: Contract) -> None:
    """As `orchestrator.initialize()`, for a contract that is known already."""
    from orchestrator.job import joining  # it imports JAX, which launchers do without

    joining.join(contract)

"""Environment variables that this package reads: each name once, with its meaning, and the checks of those that several
parts read. What only launchers and their processes exchange is in `rules/contract`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from orchestrator.errors import UsageError

HOST_NAME = "ORCHESTRATOR_HOST_NAME"  # the name that people see in logs and messages; the machine's if unset
RESTART_COUNT = "ORCHESTRATOR_RESTART_COUNT"  # 0 in the first incarnation, one more after each restart of the job
HEARTBEAT_FILE = "ORCHESTRATOR_HEARTBEAT_FILE"  # where the agent shows that it lives
FAILPOINTS = "ORCHESTRATOR_FAILPOINTS"  # faults on command: see `failpoints`
STEP_BACK = "ORCHESTRATOR_STEP_BACK"  # how many of the newest steps a restore leaves out: set in a crash loop
RECEIPT_GROUP = "ORCHESTRATOR_RECEIPT_GROUP"  # how many processes sign one receipt together, 0: none; see its rule
STORE_DEADLINE = "ORCHESTRATOR_STORE_DEADLINE_S"  # for one operation on a store, with all its retries
_STORE_DEADLINE_S = 120.0
TIER_DIR = "ORCHESTRATOR_TIER_DIR"  # where memory tiers are on this machine, if the program does not say
_TIER_DIR = "/dev/shm"
TIER_SECRET = "ORCHESTRATOR_TIER_SECRET"  # of the job: its tier servers answer nobody who does not have it; hex
TIER_SERVER = "ORCHESTRATOR_TIER_SERVER"  # host:port of this host's tier server, where a launcher runs it
TIER_PEERS = "ORCHESTRATOR_TIER_PEERS"  # host:port of each host's, with commas, in the order of the hosts
TIER_ADDRESS = "ORCHESTRATOR_TIER_ADDRESS"  # on which this host's tier server listens, where the agent runs it
DOMAIN = "ORCHESTRATOR_DOMAIN"  # what this host may be lost with: slice=s0,rack=r3,node=n17, or one word
ANONYMOUS = "ORCHESTRATOR_GCS_ANONYMOUS"  # 1: no credentials are looked for, as for public buckets
USER_PROJECT = "ORCHESTRATOR_GCS_USER_PROJECT"  # the project that pays where the bucket does not (requester pays)
EMULATOR = "STORAGE_EMULATOR_HOST"  # of Google's clients: the URL of an emulator, which asks nobody who they are
_SWITCH = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def step_back() -> int:
    """0 unless a supervisor that has recognised a crash loop asks for more. Raises UsageError for what is no count."""
    text = os.environ.get(STEP_BACK) or "0"
    if not text.isdecimal():
        raise UsageError(f"{STEP_BACK}={text!r}: expected how many of the newest steps to leave out")
    return int(text)


def receipt_group() -> int | None:
    """None where it is left to the rule. Raises UsageError for what is no number of processes."""
    text = os.environ.get(RECEIPT_GROUP, "")
    if text and not text.isdecimal():
        raise UsageError(f"{RECEIPT_GROUP}={text!r}: expected how many processes sign one receipt together")
    return int(text) if text else None


def store_deadline_s(default_s: float = _STORE_DEADLINE_S) -> float:
    """`default_s` unless the variable is set. Raises UsageError for a deadline that is no number."""
    text = os.environ.get(STORE_DEADLINE, str(default_s))
    try:
        deadline_s = float(text)
        if not 0 < deadline_s < float("inf"):
            raise ValueError
    except ValueError:
        raise UsageError(f"{STORE_DEADLINE}={text!r}: expected a positive number of seconds") from None
    return deadline_s


def tier_directory(environ: Mapping[str, str] = os.environ) -> str:
    """Raises UsageError for what is no absolute path."""
    path = environ.get(TIER_DIR) or _TIER_DIR
    if not os.path.isabs(path):
        raise UsageError(f"{TIER_DIR}={path!r}: expected an absolute path")
    return path


def gcs_emulated() -> bool:
    """Whether buckets are an emulator's."""
    return os.environ.get(EMULATOR, "") not in ("", "default")  # as gcsfs reads it


def gcs_anonymous() -> bool:
    """Raises UsageError for what is neither yes nor no."""
    text = os.environ.get(ANONYMOUS, "")
    if text.lower() not in _SWITCH:
        raise UsageError(f"{ANONYMOUS}={text!r}: expected 1 or 0")
    return _SWITCH[text.lower()]


def gcs_user_project() -> str:
    """'' if it is not set. Raises UsageError for what cannot be a project's name or number."""
    text = os.environ.get(USER_PROJECT, "")
    if not re.fullmatch(r"[A-Za-z0-9.:_-]*", text):
        raise UsageError(f"{USER_PROJECT}={text!r}: expected the name of a project")
    return text

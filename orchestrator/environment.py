"""Environment variables that several parts of the package read: each name once, with its meaning and its check."""

from __future__ import annotations

import os
import re

from orchestrator.errors import UsageError

STEP_BACK = "ORCHESTRATOR_STEP_BACK"  # how many of the newest steps a restore leaves out: set in a crash loop
STORE_DEADLINE = "ORCHESTRATOR_STORE_DEADLINE_S"  # for one operation on a store, with all its retries
_STORE_DEADLINE_S = 120.0
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


def store_deadline_s() -> float:
    """Raises UsageError for a deadline that is no number."""
    told = os.environ.get(STORE_DEADLINE, str(_STORE_DEADLINE_S))
    try:
        deadline_s = float(told)
        if not 0 < deadline_s < float("inf"):
            raise ValueError
    except ValueError:
        raise UsageError(f"{STORE_DEADLINE}={told!r}: expected a positive number of seconds") from None
    return deadline_s


def gcs_emulated() -> bool:
    """Whether buckets are an emulator's."""
    return os.environ.get(EMULATOR, "") not in ("", "default")  # as gcsfs reads it


def gcs_anonymous() -> bool:
    """Raises UsageError for what is neither yes nor no."""
    told = os.environ.get(ANONYMOUS, "")
    if told.lower() not in _SWITCH:
        raise UsageError(f"{ANONYMOUS}={told!r}: expected 1 or 0")
    return _SWITCH[told.lower()]


def gcs_user_project() -> str:
    """'' if nobody has said. Raises UsageError for what cannot be a project's name or number."""
    told = os.environ.get(USER_PROJECT, "")
    if not re.fullmatch(r"[A-Za-z0-9.:_-]*", told):
        raise UsageError(f"{USER_PROJECT}={told!r}: expected the name of a project")
    return told

"""Environment variables that several parts of the package read: each name once, with its meaning and its check."""

from __future__ import annotations

import os

from orchestrator.errors import UsageError

STORE_DEADLINE = "ORCHESTRATOR_STORE_DEADLINE_S"  # for one operation on a store, with all its retries
_STORE_DEADLINE_S = 120.0


def store_deadline_s() -> float:
    """Raises UsageError for a deadline that is no number."""
    told = os.environ.get(STORE_DEADLINE, str(_STORE_DEADLINE_S))
    try:
        deadline_s = float(told)
        if not 0 < deadline_s < float("inf"):
            raise ValueError
    except ValueError:
        raise UsageError(f"{STORE_DEADLINE}={told!r}: wanted a positive number of seconds") from None
    return deadline_s

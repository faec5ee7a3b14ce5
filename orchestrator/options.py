"""How an agent behaves. Pure values, checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import UsageError


@dataclass(frozen=True)
class Options:
    """How an agent behaves.

    async_save: False makes `save` return only when the step is committed (or has failed).
    on_save_failure: "warn" logs and counts a failed save; "raise" raises SaveFailed at the next call.
    save_timeout_s: how long a save may take from staging to decision before silent hosts are named and it is aborted.
    rendezvous_timeout_s: how long to wait for other processes at collective points (start, restore, leaving).
    preemption_grace_s: how long to wait for the commit once hosts are being preempted (SIGTERM).
    compression: zstd for array chunks. other_tree: allow saving a state tree that differs from the run's.
    host_bytes_max: how much of a state one process may hold for a save and not have written yet; None: all of it, which
    blocks the least. A larger state makes `save` wait for the store ("wait"), or is not saved ("skip"): when_full.
    attest: "save" has the devices compute a fingerprint of every array, independent of the sharding, records it and
    aborts the save if replicas of a shard differ; "full" also compares it after a restore. Process 0's counts for all.
    events_dir: where this process's events are written; None: `events/` below a root on a file system, nowhere for an
    object store; "": nowhere.
    """

    async_save: bool = True
    on_save_failure: Literal["warn", "raise"] = "warn"
    save_timeout_s: float = 600.0
    rendezvous_timeout_s: float = 300.0
    preemption_grace_s: float = 120.0
    compression: bool = False
    other_tree: bool = False
    host_bytes_max: int | None = None
    when_full: Literal["wait", "skip"] = "wait"
    attest: Literal["off", "save", "full"] = "off"
    events_dir: str | None = None

    def __post_init__(self) -> None:
        if self.on_save_failure not in ("warn", "raise"):
            raise UsageError(f"on_save_failure={self.on_save_failure!r}: wanted 'warn' or 'raise'")
        if self.when_full not in ("wait", "skip"):
            raise UsageError(f"when_full={self.when_full!r}: wanted 'wait' or 'skip'")
        if self.host_bytes_max is not None and self.host_bytes_max <= 0:
            raise UsageError(f"host_bytes_max={self.host_bytes_max!r}: wanted a positive number of bytes, or None")
        if self.attest not in ("off", "save", "full"):
            raise UsageError(f"attest={self.attest!r}: wanted 'off', 'save' or 'full'")
        for name in ("save_timeout_s", "rendezvous_timeout_s", "preemption_grace_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)!r}: wanted a positive number of seconds")

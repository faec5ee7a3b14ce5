"""Tiers: places beside the store where a job holds its newest steps. Pure values that users make, checked when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import UsageError
from orchestrator.rules import arguments
from orchestrator.rules.domains import LEVELS

COPIES_MAX = 8


class Path(Protocol):
    """As `os.PathLike`."""

    def __fspath__(self) -> str: ...


@dataclass(frozen=True)
class MemoryTier:
    """What `memory` returns."""

    every: int
    directory: str | None = None
    bytes_max: int | None = None
    keep: int = 2
    copies: int = 1
    domain: str = "node"
    copy_bytes_per_s: int | None = None

    @property
    def common(self) -> str:
        """What all hosts of a job must have in common: where it is, how large, and how fast its network, is each one's
        own."""
        return f"memory({', '.join(self._common)})"

    @property
    def _common(self) -> list[str]:
        return [f"every={self.every}", f"copies={self.copies}", f"domain={self.domain!r}", f"keep={self.keep}"]

    def __repr__(self) -> str:
        given = self._common
        given += [] if self.directory is None else [f"directory={self.directory!r}"]
        given += [] if self.bytes_max is None else [f"bytes_max={self.bytes_max}"]
        given += [] if self.copy_bytes_per_s is None else [f"copy_bytes_per_s={self.copy_bytes_per_s}"]
        return f"memory({', '.join(given)})"


def memory(
    every: int = 20,
    *,
    copies: int = 1,
    domain: str = "node",
    directory: str | Path | None = None,
    bytes_max: int | None = None,
    keep: int = 2,
    copy_bytes_per_s: int | None = None,
) -> MemoryTier:
    """Hold every `every`-th step in the memory of the job's hosts, beside what `save=` sends to the store.

    copies: how many other hosts have a copy of what each host holds; 0: none. On one host there are none. domain: these
    are in another "node", "rack" or "slice" (`ORCHESTRATOR_DOMAIN`, or as Slurm and TPUs say). directory: on each host,
    a tmpfs or a local disk; each process has a directory of its own below it, that nobody else may enter. None:
    `ORCHESTRATOR_TIER_DIR`, or /dev/shm. bytes_max: how much the run may hold on one host, all its processes,
    copies, the step that is being written and what was fetched together; None: what the machine can spare. keep: how
    many steps are held. copy_bytes_per_s: at most so fast does each host send copies; None: as fast as it can.
    """
    arguments.whole("every", every, least=1)
    arguments.whole("copies", copies, most=COPIES_MAX)
    arguments.choice("domain", domain, *LEVELS)
    arguments.whole("keep", keep, least=1)
    for name, number in (("bytes_max", bytes_max), ("copy_bytes_per_s", copy_bytes_per_s)):
        if number is not None:
            arguments.whole(name, number, least=1)
    if directory is not None:
        arguments.path("directory", directory)
        directory = directory if isinstance(directory, str) else directory.__fspath__()
        if not directory.startswith(("/", "~")):
            raise arguments.rejection("directory", directory, "an absolute path: hosts may start in different ones")
    return MemoryTier(
        int(every),
        directory,
        None if bytes_max is None else int(bytes_max),
        int(keep),
        int(copies),
        domain,
        None if copy_bytes_per_s is None else int(copy_bytes_per_s),
    )


def memory_of(tiers: object) -> MemoryTier | None:
    """The memory tier of an agent's `tiers`, None if it has none. Raises UsageError for what is no list of tiers."""
    if isinstance(tiers, str | bytes) or not isinstance(tiers, Sequence):
        raise arguments.rejection("tiers", tiers, "a list, as [oc.memory(every=20)]")
    for tier in tiers:
        if not isinstance(tier, MemoryTier):
            raise arguments.rejection("tiers", tier, "oc.memory(...) in the list")
    if len(tiers) > 1:
        raise UsageError(f"tiers={list(tiers)!r}: expected at most one memory tier")
    return tiers[0] if tiers else None

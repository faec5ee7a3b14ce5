"""Tiers: places beside the store where a job holds its newest steps. Pure values that users make, checked when made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import UsageError
from orchestrator.rules import arguments


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

    @property
    def common(self) -> str:
        """What all hosts of a job must have in common: where it is, and how large, is each one's own."""
        return f"memory(every={self.every}, keep={self.keep})"

    def __repr__(self) -> str:
        given = [f"every={self.every}", f"keep={self.keep}"]
        given += [] if self.directory is None else [f"directory={self.directory!r}"]
        given += [] if self.bytes_max is None else [f"bytes_max={self.bytes_max}"]
        return f"memory({', '.join(given)})"


def memory(
    every: int = 20,
    *,
    directory: str | Path | None = None,
    bytes_max: int | None = None,
    keep: int = 2,
) -> MemoryTier:
    """Hold every `every`-th step in this machine's memory, beside what `save=` sends to the store.

    directory: on this machine, a tmpfs or a local disk; each process has a directory of its own below it, that nobody
    else may enter. None: `ORCHESTRATOR_TIER_DIR`, or /dev/shm. bytes_max: how much one process may hold in it, the step
    that is being written included; None: what the machine can spare. keep: how many steps are held.
    """
    arguments.whole("every", every, least=1)
    arguments.whole("keep", keep, least=1)
    if bytes_max is not None:
        arguments.whole("bytes_max", bytes_max, least=1)
    if directory is not None:
        arguments.path("directory", directory)
        directory = directory if isinstance(directory, str) else directory.__fspath__()
        if not directory.startswith(("/", "~")):
            raise arguments.rejection("directory", directory, "an absolute path: hosts may start in different ones")
    return MemoryTier(int(every), directory, None if bytes_max is None else int(bytes_max), int(keep))


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

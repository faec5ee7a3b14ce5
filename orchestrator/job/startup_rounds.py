"""What the hosts of a job send one another when they start up and when they open the epoch: the type of each message.

`rejected`: why this process cannot go on. It is sent before it is raised, so that no other one waits for it.
"""

from __future__ import annotations

import msgspec

from orchestrator.job.rounds import Raised, Round


class Arrival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """configuration: a digest of what this process was given, '' in a job of one. incarnation_id: process 0's choice.
    head: (version, write_id) of the journal's newest entry as this process sees it, None in a new run."""

    configuration: str
    incarnation_id: str = ""
    head: tuple[int, str] | None = None
    rejected: Raised | None = None


class Sighting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether this process sees what another one has written. url: of its root. sees: None if it has not looked."""

    url: str
    sees: bool | None = None
    rejected: Raised | None = None


class FirstSave(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """step: that this process saves. described: it has nothing against what it was given; what it rejects is the run,
    then. mark: the key of process 0's mark."""

    step: int
    described: bool = False
    mark: str = ""
    rejected: Raised | None = None


class FirstRestore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """mark: the key of process 0's mark."""

    mark: str = ""
    rejected: Raised | None = None


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The epoch that process 0 has opened, by which version of the journal."""

    epoch: int
    version: int


FIRST_SAVE: Round[FirstSave] = Round("open the epoch: first save", FirstSave)
FIRST_RESTORE: Round[FirstRestore] = Round("restore: open the epoch", FirstRestore)
ONE_ROOT: Round[Sighting] = Round("open the epoch: one root", Sighting)
OPENED: Round[Opened] = Round("open the epoch", Opened)


def arrival(name: str) -> Round[Arrival]:
    return Round(name, Arrival)


def configurations(name: str) -> Round[dict[str, str]]:
    """Where the digests differ: each process's settings."""
    return Round(f"{name}: configurations", dict[str, str])


def one_root(name: str) -> Round[Sighting]:
    """Where the heads differ."""
    return Round(f"{name}: one root", Sighting)

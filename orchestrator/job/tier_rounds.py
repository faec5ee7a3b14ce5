"""What the processes of a job send one another about their memory tiers: each round, and the type of its messages.

`problem`: why this process has no tier, or cannot have another's; '' if it has. It concerns the tier alone: saves to
the store and restores from it go on.
"""

from __future__ import annotations

import msgspec

from orchestrator.job.rounds import Round


class KnownStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A step of which this host has something, or which the journal has. logged: a log lists it. manifests: where its
    manifest is, and whole, by host and directory."""

    step: int
    attempt: str
    manifest_crc32c: str
    bytes: int
    time: float
    logged: bool = True
    manifests: tuple[tuple[int, int], ...] = ()


class OfferedPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """host: where, by number. process: whose directory it is in. files: as `held.spans`."""

    host: int
    process: int
    files: str


class OfferedStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What this host has of a step. files: how many the step consists of, 0 where that is not known here. fault: what
    is wrong with what is here, '' if nothing is, as far as sizes tell."""

    step: int
    attempt: str
    manifest_crc32c: str
    files: int = 0
    parts: tuple[OfferedPart, ...] = ()
    fault: str = ""


class Journalled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What process 0 reads in the run's journal. run: the run's identity. tree: of the newest restorable step. newest,
    barred: as in `held.Standing`. committed: steps that may be restored from the store."""

    run: str
    epoch: int
    tree: str | None
    newest: tuple[int, str] | None = None
    barred: tuple[tuple[int, str], ...] = ()
    committed: tuple[KnownStep, ...] = ()


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a process holds. base: the directory of its host's tiers. machine: what tells its machine apart. node,
    rack, slice: what its host may be lost with, '' where that is not known. secret: what tells secrets apart, and does
    not tell them; '' if it was given none."""

    base: str
    machine: str
    node: str = ""
    rack: str = ""
    slice: str = ""
    secret: str = ""
    problem: str = ""


class Serving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a host's tier server listens, by the first process of the host; the others say nothing."""

    address: str = ""
    problem: str = ""


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where this process holds, and the newest entry of its log there. listed: the steps that it says are held, and
    their attempts."""

    path: str
    version: int = -1
    write_id: str = ""
    listed: tuple[tuple[int, str], ...] = ()
    problem: str = ""


PLACES: Round[Place] = Round("memory tier: where it is on each host", Place)
SECRET: Round[str] = Round("memory tier: the job's secret", str)
SERVING: Round[Serving] = Round("memory tier: servers", Serving)
RUN: Round[str] = Round("memory tier: which run", str)
OPENED: Round[Opened] = Round("memory tier: open", Opened)
REACHED: Round[str] = Round("memory tier: reach the others'", str)
JOURNALLED: Round[Journalled | None] = Round("restore: memory tier", Journalled | None)
KNOWN: Round[tuple[KnownStep, ...]] = Round("restore: memory tiers on each host", tuple[KnownStep, ...])
OF_THIS_RUN: Round[tuple[str, ...]] = Round("restore: whose held steps these are", tuple[str, ...])
OFFERS: Round[tuple[OfferedStep, ...]] = Round("restore: held steps", tuple[OfferedStep, ...])
